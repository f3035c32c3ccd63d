"""Figures of supervised fine-tuning: tokens a second beside ``tokenizers`` alone, how full sequences are, and what head
and loss take with and without logits.

The shipped sample, repeated, each copy with its number in every text but the system's. Both sides take turns in this
process on the same texts and the same cores, and the fastest of each counts, since other load only adds.
``tokenizers`` gets the finished texts of the conversations; ours starts from the file: it reads, checks and renders the
rows, tokenises so that no message can forge a control token, and makes the masks.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from rich.console import Group
from rich.table import Table

import paddledsv4.sft
from benchmarks import head_loss, packed_experts
from benchmarks.tell import run, tell
from paddledsv4.sft.dataset import Document, read_documents
from paddledsv4.sft.packing import efficiency, packed_batches
from paddledsv4.sft.render import render
from paddledsv4.sft.rows import RowFile, conversation
from paddledsv4.sft.tokenizer import load_tokenizer

EXAMPLES = """Examples:

    python benchmarks/sft.py

    python benchmarks/sft.py --copies 100 --workers 2 --json sft.json
"""
SAMPLE = Path(paddledsv4.sft.__file__).parent / "data" / "sample.jsonl"


def texts_of(path: Path) -> list[str]:
    """What the file's conversations look like as text."""
    checked = [conversation(row.payload) for row in RowFile(path)]
    return [render(c.messages, c.thinking_mode or "chat", drop_thinking=False).text for c in checked]


def corpus_lines(copies: int) -> Iterator[str]:
    """Rows of the sample under new texts; system prompts and tools recur, as they do in real data."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    for copy, row in itertools.product(range(copies), rows):
        messages = [
            message if message["role"] == "system" else message | {"content": f"{copy} {message['content']}"}
            for message in row["messages"]
        ]
        yield json.dumps(row | {"messages": messages}, ensure_ascii=False) + "\n"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rates(path: Path, workers: int, repeat: int) -> dict[str, float]:
    """Tokens a second: ours, and of ``tokenizers`` alone."""
    texts, whole = texts_of(path), load_tokenizer().whole
    ids = [encoding.ids for encoding in whole.encode_batch(texts, add_special_tokens=False)]
    documents = read_documents(path, workers=workers)
    if [d.token_ids.tolist() for d in documents] != ids:
        raise SystemExit("the two sides give different tokens")
    ours, theirs = [], []
    for _ in range(repeat):
        theirs.append(seconds(lambda: [e.ids for e in whole.encode_batch(texts, add_special_tokens=False)]))
        ours.append(seconds(lambda: read_documents(path, workers=workers)))
    tokens = sum(map(len, ids))
    return {"tokens": tokens, "ours": tokens / min(ours), "tokenizers": tokens / min(theirs)}


def packing(documents: list[Document]) -> list[dict[str, float]]:
    """How full sequences are, by length."""
    figures = []
    for length in (512, 1024, 2048, 4096):
        start = time.perf_counter()
        batches = list(packed_batches(documents, length, multiple=64))
        spent = time.perf_counter() - start
        full = list(packed_batches(documents, length, multiple=length))
        figures.append({"sequence_length": length, "sequences": len(batches), "efficiency": efficiency(batches),
                        "efficiency_at_full_length": efficiency(full), "seconds": spent})  # fmt: skip
    return figures


def main(
    copies: Annotated[int, typer.Option(min=1, help="How often the sample is repeated for the rate.")] = 25,
    workers: Annotated[int, typer.Option(min=0, help="Processes that tokenise; 0: threads of this one.")] = 0,
    repeat: Annotated[int, typer.Option(min=1, help="Turns; the fastest counts.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the measured loss.")] = 512,
    experts: Annotated[bool, typer.Option("--experts", help="Also packed experts, which takes minutes.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        corpus.write_text("".join(corpus_lines(copies)), encoding="utf-8")
        rate = rates(corpus, workers, repeat)
    packed = packing(read_documents(SAMPLE))
    table = Table("", "tokens/s", "of tokenizers alone", title=f"{rate['tokens']:,} tokens")
    for side in ("tokenizers", "ours"):
        table.add_row(side, f"{rate[side]:,.0f}", f"{rate[side] / rate['tokenizers']:.0%}")
    columns = ("sequence length", "sequences", "not padding", "at full length", "seconds")
    rooms = Table(*columns, title="The sample, packed")
    for row in packed:
        shown = f"{row['efficiency']:.1%}", f"{row['efficiency_at_full_length']:.1%}", f"{row['seconds']:.3f}"
        rooms.add_row(str(row["sequence_length"]), str(row["sequences"]), *shown)
    heads = head_loss.figures(tokens, 64)
    logits = heads[0]["logits_bytes"]
    losses = Table("", "peak MB", "logits", "seconds", "loss", title=f"Loss of {tokens} tokens, vocabulary 129,280")
    for row in heads:
        peak = row["peak_bytes"]
        shown = f"{peak / 1e6:,.0f}", f"{peak / logits:.2f}", f"{row['seconds']:.1f}", f"{row['loss']:.5f}"
        losses.add_row(row["kind"], *shown)
    tables, figures = [table, rooms, losses], [rate, *packed, *heads]
    if experts:
        figures += (sides := packed_experts.figures(4096, repeat))
        tables.append(packed_experts.table_of(sides, 4096))
    tell(Group(*tables), figures, out)


if __name__ == "__main__":
    run(main, __doc__, EXAMPLES)
