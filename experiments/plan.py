"""Whether a training step fits a device that is not there, and what it costs: compiled, not run.

    python -m experiments.plan --config=experiments/configs/llama_1b.py --topology=v5e:4x4 --meshes=fsdp=16
    python -m experiments.plan --config=experiments/configs/llama_1b.py --topologies=v5e:4x4,h200 \\
        --optimizers=adamw,galore:projector=power,apollo_mini --backprop=full,projected \\
        --meshes="data=16;fsdp=8,tensor=2" --plot=plan.png

The step is that of `experiments.pretrain` for the same configuration. Targets are TPU slices as
libtpu names them, h100, h200, rtx4090, and cpu:N (fake devices). libtpu comes with `make test-tpu`,
or name a Python that has it with --python. Several values of a list give one table. Each program is
compiled in a process of its own; rows are kept in --cache, so that the same command goes on after
Ctrl-C or a kill, and compiles anew when the code has changed.

The table, of one chip: GiB of parameters, optimizer state, temporaries (gradients and activations,
which the compiler does not tell apart) and program, at their peak; TFLOP of an update by formula;
GiB that collectives give in an update between two refreshes. A TPU's compiler refuses what it
cannot place, and its peak is then a lower bound. Where nothing but one case is asked for and it
does not fit, the smallest change that makes it fit is searched by compiling candidates (--noadvise
leaves that out).

Exit codes: 0 everything fits, 1 something does not or failed, 2 wrong configuration, 130
interrupted.
"""

import pathlib

from absl import app

from experiments.planning import command
from experiments.settings import arguments, configuration

if __name__ == "__main__":
    default_file = pathlib.Path(__file__).parent / "configs" / "llama_1b.py"
    app.run(command.main, flags_parser=arguments.parser(configuration, default_file))
