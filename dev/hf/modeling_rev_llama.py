"""
The reversible networks of rev_gpt2 in transformers, with Llama's block: weights by Llama's names, in other recurrences.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

FOLDER is what `hf.py export` wrote; this file lies in it, and modeling_rev.py, which has the recurrences.
"""
import torch
import torch.nn.functional as F
from torch import nn

from .modeling_rev import Block, RevConfig, RevLMHeadModel, RevModel, at_least_float32


class RevLlamaConfig(RevConfig):
    model_type = "rev_llama"

    def __init__(self, vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4,
                 head_dim=None, max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, **kwargs):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings, self.rms_norm_eps, self.rope_theta = max_position_embeddings, rms_norm_eps, rope_theta
        if num_attention_heads % num_key_value_heads:
            raise ValueError(f"{num_attention_heads} heads cannot share {num_key_value_heads} of keys and values")
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class StreamNorm(nn.Module):
    """x w / sqrt(mean of x² + eps), in the streams' precision"""
    def __init__(self, channels, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), eps

    def forward(self, stream):
        size = stream.square().mean(-1, keepdim=True)
        return (stream * torch.rsqrt(size + self.eps) * self.weight).to(self.weight.dtype)


def rotations(position_ids, size, base, dtype):
    """Cosine and sine, (B or 1, 1, T, size / 2), of the angles by which the pairs of a head's elements are turned."""
    speed = base ** -(torch.arange(0, size, 2, device=position_ids.device).to(dtype) / size)
    angle = position_ids[:, None, :, None] * speed
    return angle.cos(), angle.sin()


def rotated(x, cos, sin):
    """Element i is the first of a pair, i + size / 2 the second."""
    cos, sin = cos.to(x), sin.to(x)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Projection(nn.Linear):
    writes_into_streams = True  # and is initialized the smaller for it


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim, C = config.head_dim, config.hidden_size
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(C, queries, bias=False)
        self.k_proj = nn.Linear(C, keys, bias=False)
        self.v_proj = nn.Linear(C, keys, bias=False)
        self.o_proj = Projection(queries, C, bias=False)

    def forward(self, x, past):
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, -1, self.head_dim).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotated(q, *past.rotations), rotated(k, *past.rotations)
        return self.o_proj(past.attend(q, k, v).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(Block):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = StreamNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = StreamNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def attention(self, p, past):
        return self.self_attn(self.input_layernorm(p), past)

    def feed_forward(self, p):
        return self.mlp(self.post_attention_layernorm(p))


class RevLlamaModel(RevModel):
    config_class = RevLlamaConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.n_layer))
        self.norm = StreamNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    wte = property(lambda self: self.embed_tokens)  # what RevModel calls them
    h = property(lambda self: self.layers)
    ln_f = property(lambda self: self.norm)

    def set_input_embeddings(self, embeddings):
        self.embed_tokens = embeddings

    def embed(self, x, past, token_type_ids):
        """Positions are for the attentions; token_type_ids, which some tokenizers of such models give, mean nothing to them."""
        past.rotations = rotations(past.position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        return x


class RevLlamaLMHeadModel(RevLMHeadModel):
    config_class = RevLlamaConfig
    base_model_prefix = "model"
    body = RevLlamaModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
