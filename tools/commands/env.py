"""`tokexport env`."""

from __future__ import annotations

import click


@click.command("env")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON on stdout.")
def command(as_json):
    """Show what a bug report needs: versions, processor, which runtimes load and why the others do not, GPUs and
    their driver.
    """
    from ...engines.measure.environment import environment
    from ..show.terminal import console, print_json, size_words, stages

    out = console()
    with stages(out) as progress:
        progress("loading the runtimes")
        here = environment()
    if as_json:
        print_json(here.to_json())
        return
    cpu = here.processor
    lines = [
        ("tokexport", here.tokexport),
        ("Python", here.python),
        ("system", here.system),
        ("processor", f"{cpu.name}, {cpu.cores} core{'s' * (cpu.cores != 1)} usable"),
        ("instructions", " ".join(cpu.instructions) or "none that matter here are known"),
        ("packages", ", ".join(f"{name} {number}" for name, number in here.versions.items() if name != "tokexport")),
        *((f"runtime {r.name}", r.problem and f"cannot be used: {r.problem}" or "loads") for r in here.runtimes),
        ("NVIDIA driver", here.driver.problem or f"{here.driver.version}, CUDA up to {here.driver.cuda}"),
        *(("GPU", f"{g.name}, {size_words(g.memory)}, compute capability {g.capability}") for g in here.driver.gpus),
    ]
    width = max(len(title) for title, _ in lines)
    for title, text in lines:
        out.print(f"{title:<{width}}  {text}", markup=False)
