"""Trains the demo's model on the standard library's source, key=value recall and copying."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from kvjax.config import ModelConfig, read_toml
from kvjax.model import init
from kvjax.train.checkpoint import load_state, save_state
from kvjax.train.data import library_files, read_bytes, split_files
from kvjax.train.loss import token_losses
from kvjax.train.mixture import Mixture, Phase
from kvjax.train.recall import copy_sequence, dense_recall, needle_recall
from kvjax.train.step import TrainState, forward, make_train_step, muon, schedule, start

END = 256


@dataclasses.dataclass(frozen=True)
class Arguments:
    config: Path = Path("configs/demo.toml")
    run: Path = Path("runs/demo")
    steps: int | None = None
    save_every: float = 240.0
    measure: int = 0
    weights: Path | None = None


def initial_params(config, seed):
    def adjust(path, leaf):
        names = [p.key for p in path]
        if names[0] == "embed":
            return leaf * 50.0
        if names[0] == "head":
            return leaf * 0.3
        return jnp.zeros_like(leaf) if names[-2] in ("o", "down") else leaf

    return jax.tree_util.tree_map_with_path(adjust, init(config, seed, dtype=jnp.float32).params)


def main(args: Arguments) -> None:
    config = ModelConfig.from_toml(args.config)
    table = dict(read_toml(args.config)["train"])
    steps = args.steps or table["steps"]
    train_files, held_files = split_files(library_files())
    code, held = read_bytes(train_files, END), read_bytes(held_files, END)
    print(len(train_files), len(held_files), len(code), len(held), flush=True)
    mixture = Mixture(
        code, END, tuple(Phase(*p) for p in table["phases"]), table["filler_from"], table["filler_until"],
        table["filler"], table["seed"],
    )
    optimizer = muon(
        schedule(table["learning_rate"], steps, table["warmup"], table["decay"]), weight_decay=table["weight_decay"],
        clip=table["clip"]
    )
    logits = forward(config, scan=False)
    train_step = {}
    state = start(initial_params(config, table["seed"]), optimizer)
    file = args.run / "state.npz"
    if file.exists():
        state = load_state(file, state)
    elif args.weights is not None:
        old = load_state(args.weights, TrainState(state.params, (), state.step))
        state = TrainState(old.params, state.optimizer, state.step)
    args.run.mkdir(parents=True, exist_ok=True)
    log = (args.run / "log.jsonl").open("a")

    @jax.jit
    def losses(params, tokens):
        lg = logits(params, tokens)
        return token_losses(lg, tokens), lg[:, :-1].argmax(-1) == tokens[:, 1:]

    def evaluate(params, length):
        rng = np.random.default_rng(12345)
        row = {}
        rows = [held[i * length : (i + 1) * length] for i in rng.permutation(len(held) // length)[: 16384 // length]]
        out = [losses(params, jnp.asarray(r[None])) for r in rows]
        row["code"] = float(np.mean([np.mean(o[0]) for o in out]))
        makers = dict(
            dense=lambda: dense_recall(length, 0, held, END, rng),
            filler=lambda: dense_recall(length, 160, held, END, rng),
            needle=lambda: needle_recall(max(length, 256), held, END, rng),
            copy=lambda: copy_sequence(length, held, END, rng, 2.0),
        )
        for name, make in makers.items():
            good, all_ = 0.0, 0.0
            for _ in range(4):
                tokens, weights = make()
                _, right = losses(params, jnp.asarray(tokens[None]))
                chosen = weights[1:] == 2.0
                good += float((np.asarray(right)[0] * chosen).sum())
                all_ += float(chosen.sum())
            row[name] = round(good / max(all_, 1), 4)
        return row

    begin = saved = time.time()
    first = int(state.step)
    total, since = 0.0, 0
    for step in range(first, args.measure or steps):
        phase = mixture.phase(step)
        rows, length = phase.rows, phase.length
        key = (rows, length)
        if key not in train_step:
            train_step[key] = make_train_step(logits, optimizer, max(1, rows * length // 1024))
        tokens, weights = mixture.batch(step)
        state, metrics = train_step[key](state, jnp.asarray(tokens), jnp.asarray(weights))
        total += float(metrics["loss"])
        since += 1
        if step == first:
            print("compile", time.time() - begin, flush=True)
            begin = time.time()
        if (step + 1) % 20 == 0:
            rec = dict(step=step + 1, loss=total / since, gn=float(metrics["gradient_norm"]), clock=time.time(),
                       per_step=(time.time() - begin) / max(step - first, 1))
            if (step + 1) % 100 == 0:
                rec.update(evaluate(state.params, length))
            total, since = 0.0, 0
            print(json.dumps(rec), file=log, flush=True)
        if time.time() - saved > args.save_every or step + 1 == steps:
            save_state(file, state)
            saved = time.time()


if __name__ == "__main__":
    main(tyro.cli(Arguments))
