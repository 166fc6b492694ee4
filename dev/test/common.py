"""
transformers' own tests of a model, on the networks of modeling_rev_gpt2.py.

    python3 dev/test/common.py DIR [TEST ...]      for example test_resize_tokens_embeddings; without names, all

DIR is a checkout of transformers, or its unpacked source distribution (pip download --no-deps --no-binary :all:
transformers==VERSION), of the version that is installed: the tests are in no wheel. Needs torch, transformers, accelerate, peft,
pytest and parameterized. A source distribution lacks the tests of generation and of export; test_hf.py has its own. The last
line is `N passed, N failed`; LEFT_OUT says what is not run, and why.
"""
import importlib, sys, types, unittest
from pathlib import Path

import torch

if len(sys.argv) < 2 or not Path(sys.argv[1], "tests", "test_modeling_common.py").is_file():
    print("common.py: DIR/tests/test_modeling_common.py is meant, from transformers' sources", file=sys.stderr)
    sys.exit(2)
HERE = Path(__file__).resolve()
sys.path[:0] = [sys.argv[1], str(HERE.parents[1])]

LEFT_OUT = dict.fromkeys(
    ["test_gradient_checkpointing_enable_disable", "test_training_gradient_checkpointing",
     "test_training_gradient_checkpointing_use_reentrant_false", "test_training_gradient_checkpointing_use_reentrant_true"],
    "asks for layers that are checkpointed one by one; here all are reversed at once, which test_hf.py compares with autograd")
LEFT_OUT["test_bc_cache_name_forward"] = "asks for a warning of past_key_values, which is as good here as its newer name"
sys.modules["tests"] = types.ModuleType("tests")  # not by the path: another package may be installed by that name
sys.modules["tests"].__path__ = [str(Path(sys.argv[1], "tests"))]
mixins = []
for name, mixin in [("tests.generation.test_utils", "GenerationTesterMixin"), ("tests.exporters.test_export", "ExportTesterMixin")]:
    if not Path(sys.argv[1], *name.split(".")).with_suffix(".py").is_file():  # an empty one, for those who import it
        parent = name.rpartition(".")[0]
        sys.modules[parent], sys.modules[name] = types.ModuleType(parent), types.ModuleType(name)
        setattr(sys.modules[name], mixin, type(mixin, (), {}))
        LEFT_OUT["test_generation_tester_mixin_inheritance"] = "asks for the tests of generation, which are not there"
    elif "generation" in name:
        mixins.append(getattr(importlib.import_module(name), mixin))
common = importlib.import_module("tests.test_modeling_common")
from hf.modeling_rev_gpt2 import RevGPT2Config, RevGPT2LMHeadModel, RevGPT2Model  # noqa: E402
from transformers.models.auto import modeling_auto as auto  # noqa: E402

auto.MODEL_MAPPING_NAMES["rev_gpt2"] = "RevGPT2Model"  # the tests ask by name what a model returns
auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["rev_gpt2"] = "RevGPT2LMHeadModel"
NETWORKS = {
    "midpoint": {}, "midpoint-a": dict(coefficients=[1.25, -0.75]), "leapfrog": dict(step_size=0.7), "hamiltonian": dict(step_size=1.0),
    "retrofit": dict(coefficients=[-0.0625], stem=1, fixed_point=1), "bdia": dict(coefficients=[0.25], ordinary=[1])}


class Tester:
    """What the tests ask of a model: a small config, and inputs for it."""
    def __init__(self, parent, mode):
        self.parent, self.mode, self.is_training = parent, mode, True
        self.batch_size, self.seq_length, self.vocab_size = 3, 7, 99
        self.num_hidden_layers, self.num_attention_heads, self.hidden_size = 2, 4, 32

    def get_config(self):
        return RevGPT2Config(
            vocab_size=self.vocab_size, n_positions=64, n_embd=self.hidden_size, n_layer=self.num_hidden_layers, mode=self.mode,
            n_head=self.num_attention_heads, pad_token_id=98, bos_token_id=97, eos_token_id=97, **NETWORKS[self.mode])

    def prepare_config_and_inputs_for_common(self):
        shape = self.batch_size, self.seq_length
        inputs = {"input_ids": common.ids_tensor(shape, self.vocab_size - 3), "attention_mask": torch.ones(shape, dtype=torch.long)}
        return self.get_config(), inputs


def case(mode):
    def setUp(self):
        self.model_tester = Tester(self, mode)
    members = dict(all_model_classes=(RevGPT2Model, RevGPT2LMHeadModel), all_generative_model_classes=(RevGPT2LMHeadModel,),
                   has_attentions=True, setUp=setUp, test_torchscript=False)
    return type(mode, (common.ModelTesterMixin, *mixins, unittest.TestCase), members)


def main():
    passed, failed, skipped = 0, 0, 0
    for mode in NETWORKS:
        made = case(mode)
        every = unittest.TestLoader().getTestCaseNames(made)
        names = [n for n in every if n not in LEFT_OUT and (not sys.argv[2:] or n in sys.argv[2:])]
        for name in names:
            result = unittest.TestResult()
            made(name).run(result)
            bad = result.failures + result.errors
            passed, failed, skipped = passed + (not bad and not result.skipped), failed + bool(bad), skipped + bool(result.skipped)
            for _, trace in bad:
                print(f"FAILED: {mode}, {name}\n{trace if sys.argv[2:] else trace.strip().splitlines()[-1]}", flush=True)
    for name, reason in LEFT_OUT.items():
        print(f"left out: {name} {reason}")
    print(f"{skipped} skipped by themselves\n{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
