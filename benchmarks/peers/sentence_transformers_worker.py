"""sentence-transformers behind a pipe, one line of JSON per message.

Run by the interpreter of its own environment; needs nothing else of this project:

    python sentence_transformers_worker.py --model DIRECTORY --texts FILE --vectors FILE

FILE holds a JSON list of texts. Each line on stdin has all of them encoded once, and answered with
`{"seconds": 1.0}`; the vectors of the first time are left in the other file as float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from sentence_transformers import SentenceTransformer


def main() -> None:
    """Serves until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    texts = json.loads(arguments.texts.read_text(encoding="utf-8"))
    model = SentenceTransformer(arguments.model, device="cpu")
    vectors = model.encode(texts, batch_size=arguments.batch_size)
    vectors.astype("<f4").tofile(arguments.vectors)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        model.encode(texts, batch_size=arguments.batch_size)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
