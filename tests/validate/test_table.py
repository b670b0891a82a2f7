from __future__ import annotations

import csv
import io
import json

import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.validate.latency import Timing, Workload
from ryzen_compile.validate.table import Row, human_count, human_size, render

ROWS = [
    Row("llama 1B F32", 4_400_000_000, 1_100_048_384, 2, Timing("onnxruntime", Workload("pp", 512), (4.0, 5.0))),
    Row("llama 1B F32", 4_400_000_000, 1_100_048_384, 2, Timing("huggingface", Workload("tg", 64, 512), (16.0,))),
]


def test_markdown_is_llama_benchs_table():
    assert render(ROWS) == (
        "| model        |     size | params | backend     | threads |        test |            t/s |\n"
        "| ------------ | -------: | -----: | ----------- | ------: | ----------: | -------------: |\n"
        "| llama 1B F32 | 4.10 GiB | 1.10 B | onnxruntime |       2 |       pp512 | 115.20 ± 18.10 |\n"
        "| llama 1B F32 | 4.10 GiB | 1.10 B | huggingface |       2 | tg64 @ d512 |    4.00 ± 0.00 |"
    )


def test_a_bar_in_a_name_opens_no_column():
    row = Row("a|b", 1, 1, 1, ROWS[0].timing)
    assert render([row]).splitlines()[2].startswith("| a\\|b ")


def test_json_keeps_every_sample_and_the_machine():
    records = json.loads(render(ROWS, "json", extra={"cpu_info": "Ryzen"}))
    assert records[0]["samples_ns"] == [4_000_000_000, 5_000_000_000]
    assert records[0]["samples_ts"] == [128.0, 102.4]
    assert records[0]["avg_ts"] == pytest.approx(115.2)
    assert (records[0]["n_prompt"], records[0]["n_gen"], records[0]["n_depth"]) == (512, 0, 0)
    assert (records[1]["n_prompt"], records[1]["n_gen"], records[1]["n_depth"]) == (0, 64, 512)
    assert records[1]["stddev_ns"] == 0 and records[1]["cpu_info"] == "Ryzen"


def test_jsonl_is_one_record_a_line():
    lines = render(ROWS, "jsonl").splitlines()
    assert [json.loads(line) for line in lines] == json.loads(render(ROWS, "json"))


def test_csv_has_the_scalars():
    records = list(csv.DictReader(io.StringIO(render(ROWS, "csv"))))
    assert records[1]["test"] == "tg64 @ d512" and float(records[1]["avg_ts"]) == 4.0
    assert "samples_ns" not in records[0]


def test_no_rows():
    assert len(render([]).splitlines()) == 2
    assert render([], "csv") == "" and render([], "jsonl") == "" and json.loads(render([], "json")) == []


def test_refusals():
    with pytest.raises(UsageError, match="unknown table form 'html'"):
        render(ROWS, "html")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="avg_ts"):
        render(ROWS, "json", extra={"avg_ts": 1})


@pytest.mark.parametrize(("count", "text"), [(0, "0.00 MiB"), (10 << 20, "10.00 MiB"), (1 << 30, "1.00 GiB")])
def test_sizes(count, text):
    assert human_size(count) == text


@pytest.mark.parametrize(("count", "text"), [(5_500_000, "5.50 M"), (10**9, "1.00 B")])
def test_counts(count, text):
    assert human_count(count) == text
