"""This project beside every peer that is installed, sampled in turns in one run on one shape with random weights.

    python benchmarks/peers.py --shape tinyllama-1.1b --prompt 512 --new 128 --rounds 5 --threads 2 \\
        --llama-python llama/bin/python --genai-python genai/bin/python --openvino-python ov/bin/python

Every engine is converted from the same float32 directory, into ``--work``, once. A round opens one engine after the
other, each in a process of its own that ends before the next begins (two thread pools that spin on the same cores slow
each other), warms it up and takes one sample; every other round goes backwards. The page is printed and written to
``--work``; every sample is appended to ``benchmarks/data/peers.csv``. What is not installed is skipped, and the command
that would install it is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from peer_engines.catalogue import ENVIRONMENTS, Subject, parse_recipe, peers
from peer_engines.child import Request, read_answer
from peer_engines.table import Described, Sample, Setting, append_csv, report
from peer_engines.weights import read_parameters

from ryzen_compile.errors import ConfigError
from ryzen_compile.shapes import SHAPES
from ryzen_compile.validate.machine import read_machine, stream_read_gbps

HERE = Path(__file__).resolve().parent
PREPARE_SECONDS, MEASURE_SECONDS = 3600, 900
FACTS = "facts.json"


class EngineError(Exception):
    """An engine that could not be prepared or measured; the message is its first line of the reason."""


@dataclass(frozen=True)
class Bench:
    """Where things are and how children are started."""

    folder: Path
    model: Path
    shape: str
    threads: int
    pythons: dict[str, str]

    def request(self, subject: Subject) -> Request:
        path = str(self.folder / subject.slug)
        return Request(self.shape, str(self.model), path, self.threads, subject.options)

    def run(self, subject: Subject, action: str, request: Request) -> dict[str, Any]:
        """The child's answer. Its other output goes to a log beside the files. Raises ``EngineError``."""
        command = [self.pythons[subject.environment], "-m", f"peer_engines.{subject.module}", action]
        count = str(self.threads)
        # -m finds the package in the working directory; an inherited thread count must not differ between engines.
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
        seconds = PREPARE_SECONDS if action == "prepare" else MEASURE_SECONDS
        with (self.folder / f"{subject.slug}.log").open("a") as log:
            try:
                done = subprocess.run(
                    command, check=False, input=request.to_json(), stdout=subprocess.PIPE, stderr=log, text=True,
                    cwd=HERE, env=environment, timeout=seconds,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise EngineError(f"{action} took more than {seconds} s") from error
        answer = read_answer(done.stdout)
        if answer is None:
            raise EngineError(f"{action} ended with status {done.returncode} and no answer")
        if "error" in answer:
            raise EngineError(f"{action} failed: {answer['error']}")
        return answer


def main() -> None:
    args = parse_arguments()
    # As an exception, so that the child that is being waited for ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    subjects = args.recipes + peers(args.flash)
    subjects = [s for s in subjects if any(fnmatch(s.name.lower(), f"*{part.lower()}*") for part in args.only)]
    folder = args.work.resolve() / args.shape
    folder.mkdir(parents=True, exist_ok=True)
    pythons, missing = find_pythons(args)
    bench = Bench(folder, folder / "huggingface", args.shape, args.threads, pythons)
    skipped = {s.name: missing[s.environment] for s in subjects if s.environment in missing}
    subjects = [s for s in subjects if s.name not in skipped]
    prepare_source(bench)
    facts = prepare_all(bench, subjects, args.again, skipped)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", flush=True)
    if args.prepare_only:
        return
    samples, engines = measure(bench, [s for s in subjects if s.name in facts], facts, args, skipped)
    if not samples:
        sys.exit("nothing was measured")
    setting = read_setting(bench, args)
    append_csv(args.data, samples, engines, setting)
    page = report(samples, engines, setting, skipped)
    (folder / "peers.md").write_text(page)
    print(f"\n{page}\nwritten to {folder / 'peers.md'}, samples to {args.data}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b", choices=SHAPES)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens generated one by one behind it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=read_machine().usable_cores)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument(
        "--recipes",
        nargs="+",
        type=recipe_argument,
        default=[parse_recipe("int4"), parse_recipe("int4:prefill=int8")],
        help="of this project, with settings replaced after a colon, such as int4:prefill=int8",
    )
    parser.add_argument("--work", type=Path, default=Path("peers-work"), help="converted models, kept and reused")
    parser.add_argument("--data", type=Path, default=HERE / "data" / "peers.csv", help="where samples are appended")
    parser.add_argument("--only", nargs="+", default=["*"], help="engines whose name contains one of these")
    parser.add_argument("--again", nargs="+", default=[], help="engines to prepare anew, such as ryzen_compile")
    parser.add_argument("--prepare-only", action="store_true", help="convert what is missing and stop")
    parser.add_argument("--flash", default="auto", choices=["auto", "on", "off"], help="llama.cpp's flash attention")
    for environment in ENVIRONMENTS.values():
        if environment.option:
            parser.add_argument(environment.option, default=sys.executable, help=environment.recipe)
    args = parser.parse_args()
    if min(args.prompt, args.new, args.rounds, args.threads) < 1:
        parser.error("--prompt, --new, --rounds and --threads must be at least 1")
    if args.prompt + args.new >= SHAPES[args.shape]["max_position_embeddings"]:
        parser.error(f"{args.prompt} + {args.new} tokens do not fit the context of {args.shape}")
    return args


def recipe_argument(text: str) -> Subject:
    try:
        return parse_recipe(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def find_pythons(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Interpreters that have what is needed, and for the others why not and how to get it."""
    pythons, missing = {}, {}
    for name, environment in ENVIRONMENTS.items():
        option = environment.option
        python = getattr(args, option.strip("-").replace("-", "_")) if option else sys.executable
        code = "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if u.find_spec(n) is None))"
        command = [python, "-c", code, *environment.libraries]
        try:
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE)
        except (OSError, subprocess.CalledProcessError) as error:
            missing[name] = f"{python} does not run: {error}"
            continue
        absent = done.stdout.split()
        if absent:
            missing[name] = f"not installed: {', '.join(absent)} (`{environment.recipe}`, then {option})"
        else:
            # Not resolved: a virtual environment's interpreter is a link, and what it finds depends on the link.
            pythons[name] = str(Path(python).absolute())
    return pythons, missing


def prepare_source(bench: Bench) -> None:
    """The float32 directory that everything is converted from."""
    if not (bench.model / "tokenizer.json").exists():
        print(f"writing {bench.model}", flush=True)
        source = Subject("huggingface", "source", "torch")
        bench.run(source, "prepare", bench.request(source))


def prepare_all(
    bench: Bench, subjects: list[Subject], again: list[str], skipped: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Facts of every engine, converting those that have none yet. One that fails goes to ``skipped``."""
    facts = {}
    for subject in subjects:
        wanted = any(fnmatch(subject.name.lower(), f"*{part.lower()}*") for part in again)
        try:
            facts[subject.name] = prepare(bench, subject, anew=wanted)
        except EngineError as error:
            skipped[subject.name] = str(error)
    return facts


def prepare(bench: Bench, subject: Subject, *, anew: bool) -> dict[str, Any]:
    path = bench.folder / subject.slug
    if (path / FACTS).exists() and not anew:
        facts = json.loads((path / FACTS).read_text())
        if subject.same(facts):
            return facts
    print(f"preparing {subject.name}", flush=True)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    facts = {**bench.run(subject, "prepare", bench.request(subject)), "options": subject.options}
    (path / FACTS).write_text(json.dumps(facts, indent=1))
    return facts


def measure(
    bench: Bench,
    subjects: list[Subject],
    facts: dict[str, dict[str, Any]],
    args: argparse.Namespace,
    skipped: dict[str, str],
) -> tuple[list[Sample], list[Described]]:
    """The rounds. An engine that fails is left out of those that follow."""
    samples: list[Sample] = []
    described: dict[str, Described] = {}
    for turn in range(args.rounds):
        stream = stream_read_gbps(threads=args.threads)
        print(f"round {turn + 1} of {args.rounds}: plain read {stream:.1f} GB/s", flush=True)
        for subject in subjects if turn % 2 == 0 else reversed(subjects):
            if subject.name in skipped:
                continue
            load_average = os.getloadavg()[0]
            try:
                answer = bench.run(subject, "measure", with_tokens(bench.request(subject), args, turn))
            except EngineError as error:
                skipped[subject.name] = str(error)
                print(f"  {subject.name}: {error}", flush=True)
                continue
            sample = Sample(
                turn, subject.name, answer["prefill_s"], answer["decode_s"], answer["load_s"], answer["peak_rss"],
                stream, load_average,
            )  # fmt: skip
            samples.append(sample)
            known = facts[subject.name]
            described[subject.name] = Described(
                subject.name, subject.ours, known["bytes_per_token"], known["format"], answer["versions"],
                answer["note"],
            )  # fmt: skip
            print(f"  {show(sample, args)}", flush=True)
    return samples, [described[subject.name] for subject in subjects if subject.name in described]


def with_tokens(request: Request, args: argparse.Namespace, turn: int) -> Request:
    """The round's random prompt, the same for every engine, and another to warm up on."""
    random = np.random.default_rng((args.seed, turn))
    # The tiny tokenizer's control tokens come first.
    ids = random.integers(16, SHAPES[args.shape]["vocab_size"], (2, args.prompt)).tolist()
    return replace(request, warm=ids[0], prompt=ids[1], new=args.new)


def show(sample: Sample, args: argparse.Namespace) -> str:
    return (
        f"{sample.engine:<42} prefill {args.prompt / sample.prefill_s:8.1f} tok/s   "
        f"decode {args.new / sample.decode_s:7.2f} tok/s   load {sample.load_s:5.1f} s   "
        f"peak {sample.peak_rss / 2**30:5.2f} GiB"
    )


def read_setting(bench: Bench, args: argparse.Namespace) -> Setting:
    machine, parameters = read_machine(), read_parameters(bench.model)
    cores = f"{machine.usable_cores} cores, {', '.join(machine.cpu.isa)}"
    return Setting(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=f"{machine.cpu.name} ({machine.cpu.microarchitecture}; {cores})",
        shape=args.shape,
        threads=args.threads,
        prompt=args.prompt,
        new=args.new,
        operations=parameters.prompt_operations(args.prompt),
        weights=parameters.per_token,
    )


if __name__ == "__main__":
    main()
