"""Writes a Hugging Face model and its tokenizer as OpenVINO's own.

Run by the interpreter of OpenVINO's environment:

    python openvino_export.py SOURCE DESTINATION bf16
"""

from __future__ import annotations

import argparse

import openvino
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import AutoTokenizer


def main() -> None:
    """Exports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("precision", choices=["bf16", "int8"])
    arguments = parser.parse_args()
    # The exporter's own 8-bit default: asymmetric, one scale per output channel.
    weights = OVWeightQuantizationConfig(bits=8) if arguments.precision == "int8" else None
    model = OVModelForCausalLM.from_pretrained(
        arguments.source,
        export=True,
        compile=False,
        load_in_8bit=None if weights else False,
        quantization_config=weights,
    )
    model.save_pretrained(arguments.destination)
    tokenizer, detokenizer = convert_tokenizer(
        AutoTokenizer.from_pretrained(arguments.source), with_detokenizer=True
    )
    openvino.save_model(tokenizer, f"{arguments.destination}/openvino_tokenizer.xml")
    openvino.save_model(detokenizer, f"{arguments.destination}/openvino_detokenizer.xml")


if __name__ == "__main__":
    main()
