"""Records what transformers computes for small random models: python tests/references/make_model_references.py

Writes tests/references/models/<case>/: config.json and model.safetensors as transformers saves them, and
expected.safetensors with the inputs, the logits, the loss and the gradient of every parameter (float32, CPU).
Needs the extra `parity`.
"""

import pathlib
import shutil
import sys
from collections.abc import Iterator

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

FOLDER = pathlib.Path(__file__).parent / "models"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Wavelengths at base 100 and head size 8 are 6, 20, 63 and 199 tokens: one stays, two blend, one is divided.
    "original_max_position_embeddings": 64,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
QWEN3_MOE = {
    "moe_intermediate_size": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
    "head_dim": 8,
}
GLM4_MOE = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "num_nextn_predict_layers": 0,
    "head_dim": 8,
}
WHOLE = {"partial_rotary_factor": 1.0}

# case: model type, query heads, key and value heads, tied, rope parameters, further keys
CASES = {
    "qwen2_tied_4_2": ("qwen2", 4, 2, True, {"rope_type": "default", "rope_theta": 1000000.0}, {}),
    "qwen2_untied_4_1": ("qwen2", 4, 1, False, DEFAULT, {}),
    "llama_untied_4_4": ("llama", 4, 4, False, DEFAULT, {"rms_norm_eps": 1e-5}),
    "llama_tied_4_2_scaled": ("llama", 4, 2, True, LLAMA3, {"head_dim": 8, "hidden_size": 24}),
    "qwen3_tied_4_2": ("qwen3", 4, 2, True, DEFAULT, {"head_dim": 8, "hidden_size": 24}),
    "qwen3_moe_untied_4_2": ("qwen3_moe", 4, 2, False, DEFAULT, {**QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3_moe_tied_4_4": ("qwen3_moe", 4, 4, True, DEFAULT, {**QWEN3_MOE, "mlp_only_layers": []}),
    "glm4_moe_tied_4_2": ("glm4_moe", 4, 2, True, DEFAULT | WHOLE, {**GLM4_MOE, "use_qk_norm": True}),
    "glm4_moe_untied_4_1": (
        "glm4_moe",
        4,
        1,
        False,
        DEFAULT | WHOLE,
        {**GLM4_MOE, "attention_bias": True, "norm_topk_prob": False},
    ),
}
DOCUMENTS = ((28,), (11, 17))  # lengths of the documents packed into each row


def build(case: tuple, seed: int) -> transformers.PreTrainedModel:
    """A random model whose every parameter matters: biases and norm scales are random too."""
    model_type, heads, kv_heads, tied, rope, further = case
    sizes = {
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "rope_parameters": dict(rope),
        "attn_implementation": "eager",
    }
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **further})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            else:  # a linear map [out, in], or the maps of all experts [experts, out, in]
                parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


def batch(vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    """Packed rows: tokens, labels (-1 at the end of a document and where masked), segment ids, positions; [2, 28]."""
    rng = np.random.default_rng(seed)
    length = sum(DOCUMENTS[0])
    tokens = rng.integers(0, vocab_size, (len(DOCUMENTS), length), dtype=np.int32)
    labels = np.full_like(tokens, -1)
    segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, documents in enumerate(DOCUMENTS):
        start = 0
        for number, size in enumerate(documents, 1):
            part = slice(start, start + size)
            labels[row, start : start + size - 1] = tokens[row, start + 1 : start + size]
            segment_ids[row, part], positions[row, part] = number, np.arange(size)
            start += size
    labels[0, 3:6] = -1
    return {"tokens": tokens, "labels": labels, "segment_ids": segment_ids, "positions": positions}


def compute(model: transformers.PreTrainedModel, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits [B, T, V], mean loss [] and gradients; each document goes through transformers on its own."""
    logits = torch.zeros(*inputs["tokens"].shape, model.config.vocab_size)
    for row, segments in enumerate(inputs["segment_ids"]):
        for number in np.unique(segments):
            where = torch.from_numpy(np.flatnonzero(segments == number))
            tokens = torch.from_numpy(inputs["tokens"][row]).long()[where]
            logits[row, where] = model(input_ids=tokens[None]).logits[0]
    labels = torch.from_numpy(inputs["labels"]).long()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)
    model.zero_grad()
    loss.backward()
    gradients = {f"gradient:{name}": array for name, array in named_gradients(model)}
    return {"logits": logits.detach().numpy(), "loss": loss.detach().numpy(), **gradients}


def named_gradients(model: transformers.PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Gradients by the names of the file: transformers joins the experts of a layer when it loads them."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy().copy()
        prefix, joined, part = name.partition(".experts.")
        if not joined:
            yield name, gradient
            continue
        for number, one in enumerate(gradient):
            if part == "gate_up_proj":
                for half, array in zip(("gate_proj", "up_proj"), np.split(one, 2), strict=True):
                    yield f"{prefix}.experts.{number}.{half}.weight", array.copy()
            else:
                yield f"{prefix}.experts.{number}.{part}.weight", one.copy()


def main():
    for number, (name, case) in enumerate(CASES.items()):
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        model = build(case, seed=number)
        inputs = batch(model.config.vocab_size, seed=number)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        save_file({**inputs, **compute(model, inputs)}, folder / "expected.safetensors")
        sys.stdout.write(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e3:.0f} kB\n")


if __name__ == "__main__":
    main()
