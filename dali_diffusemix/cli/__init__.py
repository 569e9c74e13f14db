"""The command line, `dali-diffusemix COMMAND`: options in, results out, one module per group of commands.

    group        --version, errors, interrupts; completion prints the script for a shell
    options      types, callbacks and completions of options
    display      results, progress, warnings
    inputs       index, fractals, pack
    generate     generate; generate_options is its options file
    stores       verify, report, review, score, export
    preview      preview
    machine      bench, doctor, demo

Results go to standard output, as lines or with `--json` as one object; progress, warnings and errors go to standard
error. Exit codes: 0 done, 1 an error of ours, 2 a wrong command line, 130 interrupted. A command imports what it needs
when it runs, so that `--help` and completion answer at once.
"""

from dali_diffusemix.cli.completion import completion_command
from dali_diffusemix.cli.generate import generate_command
from dali_diffusemix.cli.group import main
from dali_diffusemix.cli.inputs import fractals_command, index_command, pack_command
from dali_diffusemix.cli.machine import bench_command, demo_command, doctor_command
from dali_diffusemix.cli.preview import preview_command
from dali_diffusemix.cli.stores import (
    export_command,
    report_command,
    review_command,
    score_command,
    verify_command,
)

__all__ = ["main"]

# In the order in which they are used, which is that of the help.
for _command in (
    index_command,
    fractals_command,
    generate_command,
    verify_command,
    report_command,
    review_command,
    score_command,
    export_command,
    pack_command,
    preview_command,
    bench_command,
    doctor_command,
    demo_command,
    completion_command,
):
    main.add_command(_command)
