"""What a fine-tuning run made, for others: plain parameters, or the adapters alone.

An exported folder is what `base.source` reads:

    config.json     what the model is, as model.json in the folder of the run
    checkpoints/    one step that holds "params" alone (experiments.harness.checkpoint)

Folders of all forms bring the tokenizer, where it is not bytes: tokenizer.model, or tokenizer.json
and its settings.
"""

import pathlib
import sys

import lowrank_jax as lrx
from experiments.data.tokenizer import Tokenizer, make_tokenizer
from experiments.finetuning.base import (
    Base,
    meaning_of,
    read_description,
)
from experiments.finetuning.model import MODEL, Adapted, Model
from experiments.finetuning.sources import open_base, read_tuned, tuned_base
from experiments.harness import checkpoint, outputs
from experiments.harness.workdir import read_config
from experiments.models import huggingface
from experiments.settings import finetuning_configuration
from experiments.settings.finetuning_configuration import TuningConfig
from experiments.settings.sections import ConfigurationError
from lowrank_jax.interop import documents

FORMATS = ("run", "huggingface", "peft")


def export(workdir, output, form: str) -> pathlib.Path:
    """Write what a run made to the folder `output`.

    Args:
      workdir: of the run.
      output: holds nothing yet.
      form: the tuned model as "run", for `base.source`, or as "huggingface", for transformers; or
        its adapters alone as "peft", for the package of that name and the base in the form of
        transformers.

    Raises:
      ConfigurationError: `output` holds files, `workdir` no fine-tuning run with a checkpoint, or
        this model or adapter has no such form.
    """
    workdir, output = pathlib.Path(workdir), pathlib.Path(output)
    check_output(output)
    values = read_config(workdir)
    if "adapter" not in values:
        raise ConfigurationError(
            f"workdir={str(workdir)!r}: is no fine-tuning run; use python -m experiments.export"
        )
    base = tuned_base(workdir, values)
    # before its parameters are read
    if form != "run" and (base.is_vit or base.classes):
        raise ConfigurationError(
            f"--export_format={form!r}: is for language models; give 'run' for a vision "
            "transformer or a classifier"
        )
    tokenizer = _tokenizer(base)
    if form == "peft":
        _write_peft(output, workdir, finetuning_configuration.from_dict(values), base.tokenizer)
    else:
        params = base.read(base.placing())
        output.mkdir(parents=True, exist_ok=True)
        if form == "huggingface":
            ids = {f"{name}_token_id": getattr(tokenizer, name) for name in ("bos", "eos", "pad")}
            entries = {name: n if n >= 0 else None for name, n in ids.items()}
            huggingface.save(output, base.config, params, entries=entries)
        else:
            _write_run(output, read_description(workdir / MODEL), params)
    # whoever reads the folder needs no other
    for name, content in tokenizer.files.items() if tokenizer else ():
        documents.write(output / name, content)
    return output


def _tokenizer(base: Base) -> Tokenizer | None:
    """What reads text for the model; images have none."""
    try:
        return make_tokenizer(base.tokenizer) if base.tokenizer else None
    except (ValueError, OSError, ImportError) as error:
        raise ConfigurationError(str(error)) from error


def check(output, form: str, config: TuningConfig) -> None:
    """ConfigurationError unless a run of `config` makes that form, and it can be written."""
    check_output(output)
    if form == "peft" and not config.adapter.method:
        raise ConfigurationError(
            "export_format='peft': the whole model is trained; give 'huggingface' or 'run'"
        )


def check_output(output) -> None:
    """ConfigurationError unless files can be written to the folder, which holds none."""
    output = outputs.check("export", output, is_folder=True)
    if output.exists() and any(output.iterdir()):
        raise ConfigurationError(f"export={str(output)!r}: holds files; give another folder")


def _write_run(output: pathlib.Path, description: dict, params) -> None:
    checkpoints = checkpoint.Checkpoints(
        output / "checkpoints",
        meaning=meaning_of(description),
        say=lambda line: print(line, file=sys.stderr),
    )
    try:
        checkpoints.save(0, {"params": params})
    finally:
        checkpoints.close()
    outputs.write_json(output / "config.json", description)


def _write_peft(
    output: pathlib.Path, workdir: pathlib.Path, config: TuningConfig, tokenizer: str
) -> None:
    model = Model(config, open_base(config.base, config.run.seed, tokenizer), ())
    if not isinstance(model.parts, Adapted):
        raise ConfigurationError(
            "--export_format='peft': the whole model was trained; give 'huggingface'"
        )
    # PEFT's files name the layers of the base in the form of transformers
    params, rest, base = read_tuned(workdir, config, model, model.base.placing())
    adaptation = model.parts.adaptation(params, rest)
    fields = {"base_model_name_or_path": config.base.source, "task_type": "CAUSAL_LM"}
    try:
        lrx.interop.peft.save(
            output,
            adaptation,
            base,
            lrx.interop.llama.torch_name,
            views=model.parts.views,
            **fields,
        )
    except ValueError as error:
        raise ConfigurationError(f"--export_format='peft': {error}") from error
