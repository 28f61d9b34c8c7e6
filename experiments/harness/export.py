"""The newest good checkpoint of a run as a folder that Hugging Face's transformers reads.

    python -m experiments.export --workdir=runs/default --output=exported

The folder:

    config.json, model*.safetensors    experiments.models.huggingface
    tokenizer.model, or tokenizer.json the tokenizer, where the run used one
    README.md                          which run and step this is, and how text becomes tokens

Exit codes: 0 written, 1 no good checkpoint or not written, 2 wrong arguments.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    found_in,
    make_tokenizer,
)
from experiments.harness import checkpoint, outputs
from experiments.harness import workdir as folder
from experiments.harness.checkpoint import CheckpointError
from experiments.models import huggingface
from experiments.settings import configuration
from experiments.settings.configuration import RunConfig
from experiments.settings.sections import ConfigurationError
from lowrank_jax.interop import documents

_README = """# {name}, update {step}

`{architecture}`, {parameters:,} parameters, trained by `python -m experiments.pretrain` of lowrank_jax.

    model = transformers.AutoModelForCausalLM.from_pretrained("{folder}")

## Tokens

{tokens}
"""
_BYTES = """Token i below 256 is the byte i of UTF-8 text; {eos} ends a document, {bos} begins one, {pad} pads:

    ids = torch.tensor([list(text.encode())])
    text = bytes(i for i in ids[0].tolist() if i < 256).decode(errors="replace")
"""
_PIECES = """`tokenizer.model` is the SentencePiece model that the run used; {eos} ends a document.

    tokenizer = sentencepiece.SentencePieceProcessor(model_file="{folder}/tokenizer.model")
    ids = torch.tensor([tokenizer.encode(text)])
"""
_JSON = """`tokenizer.json` is the tokenizer that the run used, `tokenizer_config.json` names its special tokens;
{eos} ends a document.

    tokenizer = transformers.AutoTokenizer.from_pretrained("{folder}")
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
"""


def export(workdir, output, *, overwrite: bool = False) -> tuple[int, list[pathlib.Path]]:
    """Write the newest good checkpoint of `workdir` to `output`; returns its step and the files.

    Parameters keep their dtype. The optimizer's state is not read.

    Raises:
      ConfigurationError: `workdir` is no run of `experiments.pretrain`, or its tokenizer is gone.
      CheckpointError: the run has no checkpoint, or none that verifies.
      FileExistsError: `output` holds a model and `overwrite` is not set.
    """
    workdir, output = pathlib.Path(workdir), outputs.check("output", output, is_folder=True)
    huggingface.check_folder(output, overwrite=overwrite)
    config = _read_config(workdir)
    try:
        tokenizer = make_tokenizer(found_in(workdir) or config.data.tokenizer)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigurationError(str(error)) from error
    step, params = _read_parameters(workdir, config)
    # transformers reads the ids of special tokens from config.json; -1 is none
    ids = {f"{name}_token_id": getattr(tokenizer, name) for name in ("bos", "eos", "pad")}
    entries: dict[str, Any] = {name: id if id >= 0 else None for name, id in ids.items()}
    files = huggingface.save(output, config.model, params, overwrite=overwrite, entries=entries)
    files += [documents.write(output / name, content) for name, content in tokenizer.files.items()]
    files.append(_write_readme(output, config, step, tokenizer))
    return step, files


def _read_config(workdir: pathlib.Path) -> RunConfig:
    if not (workdir / "config.json").is_file() or not (workdir / "checkpoints").is_dir():
        remedy = "holds no run; give a folder that experiments.pretrain wrote"
        raise ConfigurationError(f"workdir={str(workdir)!r}: {remedy}")
    values = folder.read_config(workdir)
    if "adapter" in values:
        remedy = (
            "is a fine-tuning run; `python -m experiments.finetune` exports it by "
            "--export_format=huggingface"
        )
        raise ConfigurationError(f"workdir={str(workdir)!r}: {remedy}")
    return configuration.from_dict(values)


def _read_parameters(workdir: pathlib.Path, config: RunConfig) -> tuple[int, Any]:
    say = lambda line: print(line, file=sys.stderr)  # noqa: E731
    checkpoints = checkpoint.Checkpoints(
        workdir / "checkpoints",
        verify=config.checkpoint.verify,
        meaning={"model": dataclasses.asdict(config.model)},
        say=say,
    )
    try:
        restored = checkpoints.restore({"params": huggingface.shapes(config.model)}, partial=True)
    finally:
        checkpoints.close()
    if restored is None:
        raise CheckpointError(f"{workdir} holds no finished checkpoint: let the run save one first")
    return restored.step, restored.tree["params"]


def _write_readme(output: pathlib.Path, config: RunConfig, step: int, tokenizer) -> pathlib.Path:
    templates = {ByteTokenizer: _BYTES, SentencePieceTokenizer: _PIECES, JsonTokenizer: _JSON}
    tokens = templates[type(tokenizer)].format(
        eos=tokenizer.eos, bos=tokenizer.bos, pad=tokenizer.pad, folder=output
    )
    values = huggingface.config_to(config.model)
    text = _README.format(
        name=config.name,
        step=step,
        architecture=values["architectures"][0],
        parameters=huggingface.llama.parameter_count(config.model),
        folder=output,
        tokens=tokens.strip(),
    )
    return outputs.write_text(output / "README.md", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--workdir", required=True, help="run folder of experiments.pretrain")
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that the folder holds"
    )
    options = parser.parse_args(arguments)
    try:
        step, files = export(options.workdir, options.output, overwrite=options.overwrite)
    except (ConfigurationError, FileExistsError, ValueError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in files)
    print(
        f"update {step} of {options.workdir} in {options.output}: {len(files)} files, {size:,} "
        "bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
