"""
The reversible networks of rev_gpt2 in transformers: GPT-2's weights, by GPT-2's names, in other recurrences.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

FOLDER is what `hf.py export` wrote; this file lies in it, and modeling_rev.py, which has the recurrences.
"""
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .modeling_rev import Block, RevConfig, RevLMHeadModel, RevModel


class RevGPT2Config(RevConfig):
    model_type = "rev_gpt2"
    attribute_map = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head"}

    def __init__(self, vocab_size=50257, n_positions=1024, n_embd=768, n_head=12, layer_norm_epsilon=1e-5,
                 tie_word_embeddings=True, **kwargs):
        self.vocab_size, self.n_positions, self.n_embd, self.n_head = vocab_size, n_positions, n_embd, n_head
        self.layer_norm_epsilon = layer_norm_epsilon
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} is no multiple of n_head {n_head}")
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class StreamNorm(nn.LayerNorm):
    def forward(self, stream):
        weight, bias = self.weight.to(stream.dtype), self.bias.to(stream.dtype)
        return F.layer_norm(stream, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class Projection(Conv1D):
    writes_into_streams = True  # and is initialized the smaller for it


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Projection(config.n_embd, config.n_embd)

    def forward(self, x, past):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))
        return self.c_proj(past.attend(q, k, v).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Conv1D(4 * config.n_embd, config.n_embd)
        self.c_proj = Projection(config.n_embd, 4 * config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Block(Block):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = StreamNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = StreamNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def attention(self, p, past):
        return self.attn(self.ln_1(p), past)

    def feed_forward(self, p):
        return self.mlp(self.ln_2(p))


class RevGPT2Model(RevModel):
    config_class = RevGPT2Config
    base_model_prefix = "transformer"

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config) for _ in range(config.n_layer))
        self.ln_f = StreamNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.post_init()

    def set_input_embeddings(self, embeddings):
        self.wte = embeddings

    def embed(self, x, past, token_type_ids):
        x = x + self.wpe(past.position_ids)
        return x if token_type_ids is None else x + self.wte(token_type_ids)


class RevGPT2LMHeadModel(RevLMHeadModel):
    config_class = RevGPT2Config
    base_model_prefix = "transformer"
    body = RevGPT2Model
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
