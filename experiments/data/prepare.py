"""Prepares a TFDS dataset as array_record, once, for machines without TensorFlow or Beam.

    pip install -e '.[prepare]'
    python -m experiments.data.prepare c4/en --directory=/data
    python -m experiments.data.prepare wiki40b/en --directory=gs://bucket/data --beam=--runner=DataflowRunner --beam=...

then train with `--config.data.name=<the printed directory>`. `c4/en` filters a crawl of
several terabytes: give Beam a runner with many machines. `tiny_shakespeare` and `lm1b` are prepared
the same way.
"""

import argparse
import os
import sys

import tensorflow_datasets as tfds

from experiments.data.sources import builder_source, data_directory


def prepare(name: str, directory: str, beam_options: list[str] | None = None) -> str:
    """Prepares `name` under `directory` unless it is there; returns its version directory.

    Raises ImportError when the dataset's builder needs TensorFlow or Beam and they are missing.
    """
    try:
        builder = tfds.builder(name, data_dir=directory, file_format="array_record")
        options = {}
        if beam_options:
            from apache_beam.options.pipeline_options import PipelineOptions

            options["beam_options"] = PipelineOptions(beam_options)
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(**options))
    except (ImportError, tfds.core.DatasetNotFoundError) as error:
        if _installed("tensorflow") and _installed("apache_beam"):
            raise
        raise ImportError(
            f"{name!r} is unknown to TFDS here, or its builder needs TensorFlow and Apache Beam, "
            "which are missing: pip install -e '.[prepare]', here or on another machine, "
            "and copy the prepared directory"
        ) from error
    return os.fspath(builder.data_path)


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="a TFDS name, such as c4/en")
    parser.add_argument(
        "--directory",
        default="",
        help="default: $LOWRANK_JAX_DATA, else ~/.cache/lowrank_jax/datasets",
    )
    parser.add_argument(
        "--beam", action="append", default=[], help="one option for Apache Beam; may be repeated"
    )
    options = parser.parse_args(arguments)
    try:
        path = prepare(options.name, data_directory(options.directory), options.beam)
    except ImportError as error:
        sys.exit(f"error: {error}")
    source = builder_source(tfds.builder_from_directory(path))
    print(f"{source.identity}: {source.splits}\ntrain with --config.data.name={path}")


if __name__ == "__main__":
    main()
