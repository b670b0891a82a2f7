"""Reinforcement learning from verifiable rewards: a small model learns to write methods that their doctests accept.

    pip install 'ryzen-compile[train,rl]'
    python examples/grpo.py --output runs/getters

trl's GRPO trainer (group relative policy optimization; Shao et al., 2024) draws eight endings of each prompt and raises
the probability of those that do better than their group. The reward is a fact, not another model's opinion: the ending
is run in a process of its own, and earns 1 where the class then answers as its doctest says, 0.1 where it is Python at
all. Attributes that are asked for afterwards occur in no prompt of the training.
"""

from __future__ import annotations

import argparse
import ast
import doctest
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

import ryzen_compile
from ryzen_compile.runtime.paths.program import UnitTests
from ryzen_compile.runtime.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parent / "tiny-python-lm"
CLASSES = ("Point", "User", "File", "Node", "Item", "Token", "Record", "Entry", "Message", "Request")
TRAINED = (
    *("x", "y", "name", "age", "path", "mode", "size", "start", "stop", "key"),
    *("value", "left", "right", "data", "line", "width", "height", "text", "index", "count"),
)
HELD_OUT = ("first", "last", "host", "port", "code", "reason", "args", "level", "offset", "prefix")
ENDING = 10  # tokens
GROUP = 8  # endings of a prompt
BATCH = 64  # endings of a step
PARSES = 0.1  # of the reward


@dataclass(frozen=True)
class Problem:
    """A class with a method to finish, whose doctest is in the ``prompt``."""

    prompt: str

    @property
    def tests(self) -> str:
        """The doctest's examples as asserts."""
        functions = [node for node in ast.walk(ast.parse(self.prompt)) if isinstance(node, ast.FunctionDef)]
        docstrings = [ast.get_docstring(node) or "" for node in functions]
        examples = [one for text in docstrings for one in doctest.DocTestParser().get_examples(text)]
        return "\n".join(f"assert repr({one.source.strip()}) == {one.want.strip()!r}" for one in examples)


def problems(attributes: Sequence[str], number: int, seed: int) -> list[Problem]:
    generator = random.Random(seed)
    return [
        getter(generator.choice(CLASSES), *generator.sample(attributes, 2), asked=generator.randrange(2))
        for _ in range(number)
    ]


def getter(name: str, first: str, second: str, *, asked: int) -> Problem:
    attribute = (first, second)[asked]
    return Problem(
        f"class {name}:\n"
        f"    def __init__(self, {first}, {second}):\n"
        f"        self.{first} = {first}\n"
        f"        self.{second} = {second}\n"
        "\n"
        f"    def get_{attribute}(self):\n"
        f'        """Return the {attribute}.\n'
        "\n"
        f"        >>> {name}(3, 7).get_{attribute}()\n"
        f"        {(3, 7)[asked]}\n"
        '        """\n'
        "        return"
    )


def rewards(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """One for each ending, in the form that trl calls."""
    with ThreadPoolExecutor(4) as pool:  # the threads wait, each for a process
        return list(pool.map(reward, prompts, completions))


def reward(prompt: str, completion: str) -> float:
    return _reward(prompt, completion.split("\n", 1)[0])


@cache  # a group's endings are often the same
def _reward(prompt: str, line: str) -> float:
    try:
        ast.parse(prompt + line)
    except (SyntaxError, ValueError):
        return 0.0
    verdict = UnitTests(Problem(prompt).tests, before=prompt).verify(line)
    return 1.0 if verdict.passed else PARSES


def train(model: Path, output: Path, steps: int, seed: int) -> None:
    """Writes the trained model, a plain Hugging Face directory, to ``output``."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = GRPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=BATCH,
        num_generations=GROUP,
        max_completion_length=ENDING,
        learning_rate=1e-4,
        warmup_steps=5,
        max_steps=steps,
        beta=0.0,  # no pull back to the first model
        bf16=False,
        logging_steps=5,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        seed=seed,
    )
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        rewards,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": one.prompt} for one in problems(TRAINED, 256, seed)]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def pass_rate(model: Path, asked: Sequence[Problem], seed: int) -> float:
    """The share of ``GROUP`` endings of each problem that pass, drawn by the compiled model."""
    with ryzen_compile.optimize(model, "fp32") as compiled:
        tokenizer = compiled.tokenizer
        passed = [
            reward(one.prompt, ending) == 1 for one in asked for ending in endings(compiled, tokenizer, one, seed)
        ]
    return float(np.mean(passed))


def endings(model: ryzen_compile.CompiledModel, tokenizer: Tokenizer, problem: Problem, seed: int) -> Iterator[str]:
    prompt = tokenizer.encode(problem.prompt)
    rows = model.generate(prompt, do_sample=True, max_new_tokens=ENDING, num_return_sequences=GROUP, seed=seed)
    for row in rows:
        yield tokenizer.decode(row[len(prompt) :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--problems", type=int, default=64, help="to ask before and after")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    asked = problems(HELD_OUT, args.problems, args.seed)
    before = pass_rate(args.model, asked, args.seed)
    print(f"before: {before:.1%} of {len(asked) * GROUP} endings pass")
    train(args.model, args.output, args.steps, args.seed)
    print(f"after:  {pass_rate(args.output, asked, args.seed):.1%}")


if __name__ == "__main__":
    main()
