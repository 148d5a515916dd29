"""`scaling-jax reproduce`: published results from released data."""

from pathlib import Path

import cyclopts

app = cyclopts.App(name="reproduce", help="Reproduce papers from what they released.")


@app.command(name="gadre2024")
def reproduce_gadre2024(*, data: Path, out: Path = Path("reproduce/gadre2024")) -> None:
    """Every table and figure of Gadre et al. 2024 from its released testbed, and beyond.

    Args:
      data: exp_data of github.com/mlfoundations/scaling, or the folder that holds it.
      out: folder for results.json, tables, plots and report.html.
    """
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds.reproduce import gadre2024, gadre2024_page

    found = gadre2024.run(data, out, say)
    print_table(gadre2024_page.summary(found.results), "largest differences from the paper")
    print_table(found.tables["beyond_losses"], "held-out runs: relative error of losses, percent")
    print_table(
        found.tables["beyond_errors"], "error of the held-out runs: relative error, percent"
    )
    say(f"{out / gadre2024.REPORT_FILE}")


@app.command(name="chinchilla")
def reproduce_chinchilla(*, data: Path, out: Path = Path("reproduce/chinchilla")) -> None:
    """The Chinchilla law as Besiroglu et al. 2024 fit it, from their digitised points.

    Args:
      data: folder of svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla.
      out: folder for results.json, parameters.csv, points.png and report.html.
    """
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds.reproduce import chinchilla

    print_table(chinchilla.run(data, out, say), "parameters and standard errors")
    say(f"{out / chinchilla.REPORT_FILE}")
