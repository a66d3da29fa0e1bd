"""Another side of `engine.py`: GPT-2 of the same size under Hugging Face's Trainer (accelerate, DDP over gloo).

    torchrun --nproc-per-node 2 hf_train.py '{"folder": ..., "rows": 8, "steps": 60, "threads": 1, "bf16": false}'

Prints one JSON line on rank 0: rates, the tokens/s of each interval of 10 steps without the first.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **more):
        if state.global_step % 10 == 0:
            self.times.append(time.perf_counter())


def main(words: dict) -> None:
    folder, rows = Path(words["folder"]), words["rows"]
    setup = json.loads((folder / "setup.json").read_text())
    sizes, context = setup["sizes"], setup["sizes"]["context"]
    windows = np.load(folder / f"windows-{rows}.npy").astype(np.int64)[:, :, :context].reshape(-1, context)
    config = GPT2Config(
        vocab_size=setup["vocabulary"], n_positions=context, n_embd=sizes["width"], n_layer=sizes["layers"],
        n_head=sizes["heads"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"), max_steps=words["steps"], per_device_train_batch_size=rows // 2, use_cpu=True,
        ddp_backend="gloo", bf16=words.get("bf16", False), learning_rate=1e-3, save_strategy="no", report_to=[],
        logging_steps=10, disable_tqdm=True,
    )  # fmt: skip
    torch.set_num_threads(words["threads"])
    data = [{"input_ids": row, "labels": row} for row in torch.from_numpy(windows)]
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data, callbacks=[clock])
    trainer.train()
    rates = [
        10 * rows * context / (after - before) for before, after in zip(clock.times, clock.times[1:], strict=False)
    ]
    if trainer.is_world_process_zero():
        print(json.dumps({"rates": rates}), flush=True)
    os._exit(0)  # destroy_process_group sometimes never returns here


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
