"""Fine-tuning with Transformers' Trainer: all ranks share every batch, in which several conversations are packed without padding.

The model reads the signature and docstring of a Python function, byte by byte, and learns to write its body; the functions are those
of sympy, which is installed with torch. A tiny random model stands in for yours. The same file runs on CPUs and GPUs, with any number
of ranks:

python examples/hf_sft.py
distflash run -n 2 examples/hf_sft.py
torchrun --standalone --nproc-per-node 2 examples/hf_sft.py
"""

import ast
import tempfile
from itertools import islice

from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import distflash
from distflash.integrations.accelerate import SequenceParallelTrainer
from distflash.train.data import BOS, IGNORE, default_documents

LONGEST = 800  # bytes of a conversation


def conversations():
    """Tokens of functions that have a docstring; labels only for the body, which the model writes."""
    for source in default_documents():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                lines = source.splitlines(keepends=True)
                asked = list(b"".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
                answer = list(b"".join(lines[node.body[0].end_lineno : node.end_lineno]))
                if len(asked) + len(answer) < LONGEST:
                    yield {"input_ids": [BOS, *asked, *answer], "labels": [IGNORE] * (1 + len(asked)) + answer}


class SFTTrainer(SequenceParallelTrainer, Trainer):
    """A Trainer whose ranks share each batch."""


world = distflash.init()
cpu = world.device.type == "cpu"
set_seed(0)
held_out, *training = islice(conversations(), 1 + 96)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=BOS + 1, max_position_embeddings=LONGEST, **sizes))
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=12, learning_rate=1e-2, logging_steps=4,
        prediction_loss_only=True, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=cpu, bf16=not cpu,
    )  # fmt: skip
    packed = DataCollatorWithFlattening()
    trainer = SFTTrainer(model, arguments, train_dataset=training, eval_dataset=[held_out], data_collator=packed)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
if world.is_main:
    print(f"{world.size} ranks, {world.device.type}: loss of a function never seen {before:.3f}, after training {after:.3f}")
