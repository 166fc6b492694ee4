"""
The reversible networks of rev_gpt2 in transformers: GPT-2's weights, by GPT-2's names, in other recurrences.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

FOLDER is what `hf.py export` wrote; this file lies in it. Both streams, prev and cur, start as the embedding, and each step is

    next = alpha_k prev + beta_k cur + gamma_k F_k(cur);   prev = cur;   cur = next

The equations are those of "Reversing Large Language Models for Efficient Training and Fine-Tuning" (Gal and others), by number.
Streams are floating point here and integers in the trainer, so logits differ by the rounding. Training works by autograd:
nothing is reversed here, and activations are kept.
"""
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

MODES = ("midpoint", "midpoint-a", "leapfrog", "hamiltonian", "retrofit", "bdia")


class RevGPT2Config(PretrainedConfig):
    """
    mode          one of MODES
    step_size     h; of midpoint, midpoint-a, leapfrog and hamiltonian
    coefficients  the a_k of midpoint-a, one a layer; or the one a of retrofit and bdia
    fixed_point   K, the iterations of (4.7); of retrofit
    stem          how many steps at first are those of the ordinary network; of retrofit and bdia
    """
    model_type = "rev_gpt2"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head"}

    def __init__(self, vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, mode="midpoint", step_size=0.25,
                 coefficients=(), fixed_point=0, stem=0, layer_norm_epsilon=1e-5, initializer_range=0.02, use_cache=True, **kwargs):
        self.vocab_size, self.n_positions, self.n_embd, self.n_layer, self.n_head = vocab_size, n_positions, n_embd, n_layer, n_head
        self.mode, self.step_size, self.coefficients = mode, step_size, list(coefficients)
        self.fixed_point, self.stem = fixed_point, stem
        self.layer_norm_epsilon, self.initializer_range, self.use_cache = layer_norm_epsilon, initializer_range, use_cache
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} is no multiple of n_head {n_head}")
        wanted = {"midpoint-a": n_layer, "retrofit": 1, "bdia": 1}.get(mode, 0)
        if len(self.coefficients) != wanted:
            raise ValueError(f"{len(self.coefficients)} coefficients, but {mode} of {n_layer} layers takes {wanted}")
        if not (mode == "retrofit") <= stem <= (n_layer if mode in ("retrofit", "bdia") else 0):
            raise ValueError(f"a stem of {stem} steps does not go with {mode} of {n_layer} layers")
        super().__init__(**kwargs)

    @property
    def num_hidden_layers(self):
        """For so many layers transformers makes a cache: one for each evaluation of an attention, of which retrofit has more."""
        more = (self.n_layer - self.stem) * (self.fixed_point + 1) if self.mode == "retrofit" else 0
        return self.n_layer + more


# ------------------------------------------------------------------------------------------------------------------------
# The block, as GPT-2's. Streams are float32 at least, whatever the type of the weights: many small steps add up in them.

def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class StreamNorm(nn.LayerNorm):
    def forward(self, stream):
        weight, bias = self.weight.to(stream.dtype), self.bias.to(stream.dtype)
        return F.layer_norm(stream, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class Past:
    """Of one forward pass of T tokens: those before, in a cache or None, and which of all a query sees: attention_mask is 0 at padding."""
    def __init__(self, cache, before, T, attention_mask):
        self.cache, self.before, self.T, self.attention_mask, self.mask = cache, before, T, attention_mask, None
        self.evaluations = itertools.count()

    def join(self, k, v):
        """All keys and values there are for this evaluation of an attention; each evaluation has its own."""
        if self.cache is not None:
            k, v = self.cache.update(k, v, next(self.evaluations))
        if self.mask is None:
            self.mask = self.visible(k.shape[2], k.device)
        return k, v

    def visible(self, keys, device):
        """(B or 1, 1, T, keys): a query sees the keys up to its own that are no padding; its own always, lest there be none."""
        if self.attention_mask is not None and self.attention_mask.ndim == 4:  # generate has made it, for a cache of fixed size
            return self.attention_mask
        query, key = torch.arange(self.before, self.before + self.T, device=device)[:, None], torch.arange(keys, device=device)
        if self.attention_mask is None:
            return (key <= query)[None, None]
        padding = F.pad(self.attention_mask == 0, (0, keys - self.attention_mask.shape[1]))[:, None, None]
        return (key <= query) & (~padding | (key == query))


class Projection(Conv1D):
    """A matrix that writes into the streams, initialized the smaller for it."""


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)

    def forward(self, x, past):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        k, v = past.join(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=past.mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(4 * config.n_embd, config.n_embd)
        self.c_proj = Projection(config.n_embd, 4 * config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = StreamNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = StreamNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, p, past):
        A = self.attn(self.ln_1(p), past)
        return A + self.mlp(self.ln_2(p + A))                                                  # (2.5)


# ------------------------------------------------------------------------------------------------------------------------

class RevGPT2LMHeadModel(PreTrainedModel, GenerationMixin):
    config_class = RevGPT2Config
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.n_positions, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": StreamNorm(config.n_embd, eps=config.layer_norm_epsilon)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range / (math.sqrt(2 * self.config.n_layer) if isinstance(module, Projection) else 1)
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, StreamNorm):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, embeddings):
        self.transformer.wte = embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, embeddings):
        self.lm_head = embeddings

    def coefficients(self, k):
        """alpha, beta and gamma of step k."""
        mode, h, a = self.config.mode, self.config.step_size, self.config.coefficients
        if k < self.config.stem:
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

    def force(self, k, p, past):
        """F_k(p). Half a block a step makes the midpoint recurrence the Hamiltonian network: q, p, q, p, ..."""
        if self.config.mode != "hamiltonian":
            return self.transformer.h[k](p, past)
        block = self.transformer.h[k // 2]
        return block.mlp(block.ln_2(p)) if k % 2 else block.attn(block.ln_1(p), past)

    def step(self, k, prev, cur, past):
        alpha, beta, gamma = self.coefficients(k)
        force = gamma * self.force(k, cur, past)
        if self.config.mode == "retrofit" and k >= self.config.stem:  # alpha f_{k-1} where p_{k-1} is estimated to be
            estimate = cur
            for _ in range(self.config.fixed_point):
                estimate = cur - self.force(k - 1, estimate, past)                             # (4.7)
            force = force + alpha * self.force(k - 1, estimate, past)
        return alpha * prev + beta * cur + force

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, labels=None, use_cache=None,
                logits_to_keep=0, return_dict=None):
        config, net, T = self.config, self.transformer, input_ids.shape[1]
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        before = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape != (len(input_ids), before + T):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; for the cached tokens and these it is {(len(input_ids), before + T)}")
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:  # padding does not count
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, before:]
        elif position_ids is None:
            position_ids = torch.arange(before, before + T, device=input_ids.device)[None]
        past = Past(past_key_values, before, T, attention_mask)

        prev = cur = at_least_float32(net.wte(input_ids)) + net.wpe(position_ids)              # (2.1)
        for k in range(config.n_layer * (2 if config.mode == "hamiltonian" else 1)):
            prev, cur = cur, self.step(k, prev, cur, past)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(net.ln_f(cur[:, kept]))                                          # (2.3)

        loss = None
        if labels is not None:  # each token is to be foretold by the one before
            loss = F.cross_entropy(at_least_float32(logits[:, :-1]).flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)
        return output.to_tuple() if return_dict is False else output
