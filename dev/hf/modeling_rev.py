"""
Reversible networks in transformers, of any block: modeling_rev_gpt2.py and modeling_rev_llama.py have the blocks, and by whose
names their weights go.

Both streams, prev and cur, start as the embedding, and each step is

    next = alpha_k prev + beta_k cur + gamma_k F_k(cur);   prev = cur;   cur = next

The equations are those of "Reversing Large Language Models for Efficient Training and Fine-Tuning" (Gal and others), by number.
Streams are floating point here and integers in the trainer, so logits differ by the rounding. Training works by autograd, which
keeps the internals of every block; after `gradient_checkpointing_enable()` (Trainer: `gradient_checkpointing=True`) the streams
are integers here too, and the backward pass steps back through them: what is kept does not grow with depth.
"""
import itertools
import math

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import nn

OLDEST = "4.48"  # of transformers, that the tests were run with; the newest was 5.24
if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(f"modeling_rev.py: this is transformers {transformers.__version__}; {OLDEST} or newer is needed")

from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel  # noqa: E402
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402
from transformers.utils import logging  # noqa: E402

MODES = ("midpoint", "midpoint-a", "leapfrog", "hamiltonian", "retrofit", "bdia")
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"  # renamed in 5.24; both are taken here
logger = logging.get_logger("transformers.models.rev")  # not __name__: transformers' verbosity is to hold here


class RevConfig(PretrainedConfig):
    """
    n_layer       how many blocks there are; num_hidden_layers is how many attentions a cache is for
    mode          one of MODES
    step_size     h; of midpoint, midpoint-a, leapfrog and hamiltonian
    coefficients  the a_k of midpoint-a, one a layer; or the one a of retrofit and bdia
    fixed_point   K, the iterations of (4.7); of retrofit
    stem          how many steps at first are those of the ordinary network; of retrofit and bdia
    ordinary      instead of stem, the steps that are, where they are not just the first ones: [0, 1, 28, 29]
    grid          the trainer's streams were integers times 2^-grid, or floating point if 0; nothing here depends on it
    """
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    ordinary = None  # where stem says it, config.json has no such entry

    def __init__(self, n_layer=12, mode="midpoint", step_size=0.25, coefficients=(), fixed_point=0, stem=0, grid=20,
                 initializer_range=0.02, use_cache=True, ordinary=None, **kwargs):
        self.n_layer, self.mode, self.step_size, self.coefficients = n_layer, mode, step_size, list(coefficients)
        self.fixed_point, self.stem, self.grid = fixed_point, stem, grid
        self.initializer_range, self.use_cache = initializer_range, use_cache
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        wanted = {"midpoint-a": n_layer, "retrofit": 1, "bdia": 1}.get(mode, 0)
        if len(self.coefficients) != wanted:
            raise ValueError(f"{len(self.coefficients)} coefficients, but {mode} of {n_layer} layers takes {wanted}")
        if any(not a or 256 * a != int(256 * a) for a in self.coefficients):
            raise ValueError(f"coefficients {self.coefficients}: multiples of 1/256 other than 0 are meant, which reversing needs")
        if not 0 <= stem <= (n_layer if mode in ("retrofit", "bdia") else 0):
            raise ValueError(f"a stem of {stem} steps does not go with {mode} of {n_layer} layers")
        if ordinary:
            if stem:
                raise ValueError(f"a stem of {stem} steps and ordinary steps {ordinary}: one of them is meant")
            self.ordinary = sorted(set(ordinary))
            if mode not in ("retrofit", "bdia") or not set(ordinary) <= set(range(n_layer)):
                raise ValueError(f"ordinary steps {ordinary} do not go with {mode} of {n_layer} layers")
        if mode == "retrofit" and 0 not in self.ordinary_steps:
            raise ValueError("retrofit's step 0 is an ordinary one: there is no block before it to estimate a state by")
        super().__init__(**kwargs)

    @property
    def ordinary_steps(self):
        return self.ordinary or range(self.stem)

    @property
    def num_hidden_layers(self):
        """For so many layers transformers makes a cache: one for each evaluation of an attention, of which retrofit has more."""
        more = (self.n_layer - len(self.ordinary_steps)) * (self.fixed_point + 1) if self.mode == "retrofit" else 0
        return self.n_layer + more

    @num_hidden_layers.setter
    def num_hidden_layers(self, n):
        self.n_layer = n


# ------------------------------------------------------------------------------------------------------------------------
# Streams are float32 at least, whatever the type of the weights: many small steps add up in them.

def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Past:
    """
    Of one forward pass of T tokens: those before, in a cache or None, and which of all a query sees: attention_mask is 0 at
    padding. position_ids: where tokens are. eager: attention step by step; weights: a list that its weights are added to, or None.
    """
    def __init__(self, cache, before, T, attention_mask, position_ids=None, eager=False, weights=None):
        self.cache, self.before, self.T, self.attention_mask, self.position_ids = cache, before, T, attention_mask, position_ids
        self.eager, self.weights, self.mask = eager or weights is not None, weights, None
        self.evaluations = itertools.count()

    def attend(self, q, k, v):
        """Over all keys and values there are for this evaluation of an attention; each evaluation has its own."""
        if self.cache is not None:
            position = torch.arange(self.before, self.before + self.T, device=k.device)  # StaticCache of version 4 wants it
            k, v = self.cache.update(k, v, next(self.evaluations), {"cache_position": position})
        if k.shape[1] != q.shape[1]:  # several heads share one of keys and values
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        keys = k.shape[2]
        causal = self.attention_mask is None and keys == self.before + self.T and self.before * (self.T - 1) == 0
        if self.mask is None and (self.eager or not causal):
            self.mask = self.visible(keys, k.device)
        if not self.eager:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=causal and self.T > 1)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~self.mask, -math.inf) if self.mask.dtype == torch.bool else scores + self.mask
        weights = at_least_float32(scores).softmax(-1).to(v.dtype)
        if self.weights is not None:
            self.weights.append(weights)
        return weights @ v

    def visible(self, keys, device):
        """(B or 1, 1, T, keys): a query sees the keys up to its own that are no padding; its own always, lest there be none."""
        if self.attention_mask is not None and self.attention_mask.ndim == 4:  # generate has made it, for a cache of fixed size
            return self.attention_mask
        query, key = torch.arange(self.before, self.before + self.T, device=device)[:, None], torch.arange(keys, device=device)
        if self.attention_mask is None:
            return (key <= query)[None, None]
        padding = F.pad(self.attention_mask == 0, (0, keys - self.attention_mask.shape[1]))[:, None, None]
        return (key <= query) & (~padding | (key == query))


class Block(nn.Module):
    """What a layer adds to the streams: attention(p, past) and feed_forward(p), each behind its norm, are a block's own."""
    def forward(self, p, past, half=None):
        """The block, or half of it: 0 its attention, 1 its MLP."""
        if half == 1:
            return self.feed_forward(p)
        A = self.attention(p, past)
        return A if half == 0 else A + self.feed_forward(p + A)                                # (2.5)


# ------------------------------------------------------------------------------------------------------------------------
# Stepping back. Floating-point sums cannot be undone, so the streams are integers: multiples of 2^-GRID, far finer than float32.
# An increment is rounded to the grid once, and is added and subtracted exactly.

GRID = 32
LIMIT = 1 << 20  # streams beyond are an error in the trainer and NaN here; 63 - GRID bits have room for the products too
DRIFT = 2**-10  # most that stepping back may miss the embedding by; 0 if the blocks compute the same bits twice


def to_grid(x):
    return (x * 2.0**GRID).round().to(torch.int64)


def from_grid(s, dtype):
    return s.to(dtype) * 2.0**-GRID


def times(s, a):
    """s * a for a = n / 2^m; what rounding loses is lost, but the same in both directions."""
    n, d = float(a).as_integer_ratio()
    return s * n >> d.bit_length() - 1


class Remainders:
    """
    What multiplying integers by a = n / 2^m loses, so that it can be undone: the low m bits go onto a stack of digits, one number
    an element, and a digit of base n is taken from it (Maclaurin, Duvenaud & Adams 2015, section 3). A full plane of numbers is
    kept and another begun: every 15 steps for a = 1/16, hardly ever for the a_k of midpoint-a, which shrink and grow in turn.
    """
    def __init__(self, planes=(), begun=()):
        self.planes, self.begun, self.bound = list(planes), list(begun), 1 << 63

    def multiply(self, s, a, k):
        n, d = float(a).as_integer_ratio()
        if abs(n) == d:
            return s * int(a)
        if self.bound * d > 1 << 62:
            self.planes.append(torch.zeros_like(s))
            self.begun.append(k)
            self.bound = 1
        stack = self.planes[-1] * d + (s & d - 1)
        s = (s >> d.bit_length() - 1) * abs(n) + stack % abs(n)
        self.planes[-1], self.bound = stack // abs(n), -(-self.bound * d // abs(n))
        return s if n > 0 else -s

    def unmultiply(self, s, a, k):
        n, d = float(a).as_integer_ratio()
        if abs(n) == d:
            return s * int(a)
        s = s if n > 0 else -s
        stack = self.planes[-1] * abs(n) + s % abs(n)
        self.planes[-1] = stack >> d.bit_length() - 1
        if k == self.begun[-1]:
            self.planes.pop()
            self.begun.pop()
        return s // abs(n) * d + (stack & d - 1)


class Evaluation:
    """Surroundings in which a force has the same bits a second time: the mixed precision and the dropout of the first."""
    def __init__(self, x):
        kind = x.device.type
        self.kind, self.devices = kind, [x.device] if kind == "cuda" else []
        self.amp = dict(dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
        self.seed = int(torch.randint(1 << 62, ()))

    def force(self, model, k, p, past):
        with torch.random.fork_rng(self.devices):
            torch.manual_seed(self.seed + k)
            with torch.autocast(self.kind, cache_enabled=False, **self.amp):
                return at_least_float32(model.coefficients(k)[2] * model.force(k, p, past))


class Reversal(torch.autograd.Function):
    """All steps from x to the last stream. Kept are the last two streams, and what Remainders and ordinary steps (alpha = 0) need."""

    @staticmethod
    def forward(ctx, model, past, x, *parameters):
        ctx.model, ctx.past, ctx.parameters, ctx.evaluation = model, past, parameters, Evaluation(x)
        remainders, forgotten = Remainders(), []
        prev = cur = to_grid(x)
        ctx.dtype, fine = x.dtype, x.abs().amax() < LIMIT
        for k in range(model.steps):
            alpha, beta, _ = model.coefficients(k)
            force = ctx.evaluation.force(model, k, from_grid(cur, x.dtype), past)
            after = times(cur, beta) + to_grid(force)
            if alpha == 0:
                forgotten.append(prev)
            else:
                after += remainders.multiply(prev, alpha, k)
            prev, cur = cur, after
            fine = fine & (force.abs().amax() < LIMIT) & (cur.abs().amax() < LIMIT << GRID)
        ctx.begun, ctx.planes = remainders.begun, len(remainders.planes)
        ctx.save_for_backward(x, prev, cur, *remainders.planes, *forgotten)
        return torch.where(fine, from_grid(cur, x.dtype), math.nan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, B):
        model, past = ctx.model, ctx.past
        x, cur, after, *saved = ctx.saved_tensors
        remainders, forgotten = Remainders(saved[:ctx.planes], ctx.begun), saved[ctx.planes:]
        place = {id(p): i for i, p in enumerate(ctx.parameters)}
        grads = [None] * len(ctx.parameters)
        A, remains = torch.zeros_like(B), []  # what is left of streams when all is taken back: 0
        for k in reversed(range(model.steps)):
            alpha, beta, _ = model.coefficients(k)
            mine = [p for block in model.blocks(k) for p in block.parameters() if id(p) in place]
            with torch.enable_grad():
                p = from_grid(cur, ctx.dtype).requires_grad_()
                force = ctx.evaluation.force(model, k, p, past)
            dp, *dparameters = torch.autograd.grad(force, [p, *mine], B.to(force.dtype), allow_unused=True)
            for parameter, d in zip(mine, dparameters):
                i = place[id(parameter)]
                grads[i] = d if grads[i] is None else grads[i] if d is None else grads[i] + d
            prev = after - times(cur, beta) - to_grid(force.detach())
            if alpha == 0:
                remains.append(prev.abs().amax())
                prev = forgotten.pop()
            else:
                prev = remainders.unmultiply(prev, alpha, k)
            cur, after = prev, cur
            A, B = alpha * B, A + beta * B + dp
        start = to_grid(x)
        remains += [(cur - start).abs().amax(), (after - start).abs().amax()]
        drift = float(torch.stack(remains).amax()) * 2.0**-GRID
        if drift > DRIFT:  # NaN, too, is the same number twice
            raise RuntimeError(f"stepping back missed the start by {drift:.1e}: the blocks have not computed the same bits twice; "
                               "gradient_checkpointing_disable() trains by autograd")
        return None, None, (A + B) if ctx.needs_input_grad[2] else None, *grads


# ------------------------------------------------------------------------------------------------------------------------

class RevPreTrainedModel(PreTrainedModel):
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2Block", "LlamaBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_cache_class = _supports_static_cache = _supports_quantized_cache = True  # asked by version 4

    @torch.no_grad()
    def _init_weights(self, module):
        small = math.sqrt(2 * self.config.n_layer) if hasattr(module, "writes_into_streams") else 1
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            nn.init.normal_(module.weight, std=self.config.initializer_range / small)
        elif getattr(module, "weight", None) is not None:  # a norm's
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


class RevModel(RevPreTrainedModel):
    """
    A network without its head. A block's own are __init__; embed(x, past, token_type_ids), which makes the first state of the
    embedded tokens; and by these names: wte, the embedding; h, a list of blocks; ln_f, the norm at the end.
    """
    gradient_checkpointing = False  # transformers' name of the switch

    def get_input_embeddings(self):
        return self.wte

    @property
    def steps(self):
        return self.config.n_layer * (2 if self.config.mode == "hamiltonian" else 1)

    def coefficients(self, k):
        """alpha, beta and gamma of step k."""
        mode, h, a = self.config.mode, self.config.step_size, self.config.coefficients
        if k in self.config.ordinary_steps:
            return 0, 1, 1                                                                     # (2.2)
        if mode == "midpoint":
            return 1, 0, 2 * h                                                                 # (2.4)
        if mode == "midpoint-a":
            return a[k], 1 - a[k], h                                                           # (3.6)
        if mode == "leapfrog":
            return -1, 2, h * h                                                                # (2.6)
        if mode == "hamiltonian":
            return 1, 0, h                                                                     # (2.8), (2.9)
        if mode == "retrofit":
            return a[0], 1 - a[0], 1                                                           # (4.3)
        return a[0], 1 - a[0], 1 + a[0]            # bdia: (4.3), with f_j(p_j) for f_{j-1}(p_{j-1})

    def has_estimate(self, k):
        return self.config.mode == "retrofit" and k not in self.config.ordinary_steps

    def blocks(self, k):
        """Those that step k evaluates."""
        if self.config.mode == "hamiltonian":
            return [self.h[k // 2]]
        return [self.h[k], self.h[k - 1]] if self.has_estimate(k) else [self.h[k]]

    def force(self, k, p, past):
        """F_k(p). Half a block a step makes the midpoint recurrence the Hamiltonian network: q, p, q, p, ..."""
        if self.config.mode == "hamiltonian":
            return self.h[k // 2](p, past, k % 2)
        force = self.h[k](p, past)
        if self.has_estimate(k):  # alpha f_{k-1} where p_{k-1} is estimated to be
            estimate = p
            for _ in range(self.config.fixed_point):
                estimate = p - self.h[k - 1](estimate, past)                                   # (4.7)
            force = force + self.coefficients(k)[0] * self.h[k - 1](estimate, past)
        return force

    @torch.compiler.disable
    def reversing(self, x, past):
        return Reversal.apply(self, past, x, *(p for p in self.h.parameters() if p.requires_grad))

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, token_type_ids=None, position_ids=None,
                inputs_embeds=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None, cache=None, **kwargs):
        config, past_key_values = self.config, past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("either input_ids or inputs_embeds is meant")
        for name in ("encoder_hidden_states", "encoder_attention_mask", "head_mask"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: these networks have no such thing")
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        reverse = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if use_cache and reverse:
            logger.warning_once("use_cache=True does not go with gradient checkpointing; there will be no cache")
        use_cache = config.use_cache and not self.training if use_cache is None else use_cache and not reverse

        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        B, T = x.shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        before = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if attention_mask is not None and attention_mask.ndim == 2:
            if attention_mask.shape != (B, before + T):
                raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; for the cached tokens and these it is {(B, before + T)}")
            if position_ids is None:  # padding does not count
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, before:]
            if not torch.compiler.is_compiling() and (attention_mask != 0).all():
                attention_mask = None  # which is faster
        if position_ids is None:
            position_ids = torch.arange(before, before + T, device=x.device)[None]
        past = Past(past_key_values, before, T, attention_mask, position_ids, config._attn_implementation == "eager",
                    [] if output_attentions else None)

        x = self.embed(at_least_float32(x), past, token_type_ids)                              # (2.1)
        states, weights = [], []
        if reverse and past_key_values is None and not output_hidden_states and not output_attentions:
            cur = self.reversing(x, past)
        else:
            prev = cur = x
            for k in range(self.steps):
                if config.mode != "hamiltonian" or k % 2 == 0:  # a state and weights for each layer
                    states.append(cur)
                alpha, beta, gamma = self.coefficients(k)
                prev, cur = cur, alpha * prev + beta * cur + gamma * self.force(k, cur, past).to(cur.device)
                if past.weights:
                    weights.append(past.weights[0])
                    past.weights.clear()
        last = self.ln_f(cur)                                                                  # (2.3)
        output = BaseModelOutputWithPast(last_hidden_state=last, hidden_states=(*states, last) if output_hidden_states else None,
                                         attentions=tuple(weights) if output_attentions else None,
                                         **{CACHE: past_key_values if use_cache else None})
        return output.to_tuple() if return_dict is False else output


class RevLMHeadModel(RevPreTrainedModel, GenerationMixin):
    """A network and its head; body is the class of what is before that."""
    body = None

    def __init__(self, config):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.body(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, embeddings):
        self.lm_head = embeddings

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, token_type_ids=None, position_ids=None,
                inputs_embeds=None, labels=None, use_cache=None, output_attentions=None, output_hidden_states=None,
                return_dict=None, logits_to_keep=0, cache=None, **kwargs):
        """Arguments are those of transformers' own models; those it leaves over, num_items_in_batch for one, are the loss's."""
        out = self.base_model(input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds, use_cache,
                               output_attentions, output_hidden_states, cache=cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:  # each token is to be foretold by the one before
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions,
                                        **{CACHE: getattr(out, CACHE)})
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()
