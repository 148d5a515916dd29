"""What the commands print: tables and lines; plain text where no terminal is."""

import pandas as pd
from rich.console import Console
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def print_table(frame: pd.DataFrame, title: str = "") -> None:
    """Prints `frame` with numbers to five digits; every cell whole where nobody is watching."""
    text = frame.map(_cell)
    if not console.is_terminal:
        print(f"\n{title}" if title else "")
        print(text.to_string(index=False))
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in text.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[name])
        table.add_column(str(name), justify="right" if numeric else "left", overflow="fold")
    for row in text.itertuples(index=False):
        table.add_row(*row)
    console.print(table)


def say(text: str) -> None:
    """Prints a line."""
    console.print(text, markup=False)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03 or 2:03."""
    if seconds == float("inf"):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
