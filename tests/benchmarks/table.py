"""The rows of the table that run.py puts together."""


def row(what, ours, reference):
    """Print one row: what is measured, in which unit; ours and the reference's; their ratio."""
    print(f"| {what} | {ours:,.4g} | {reference:,.4g} | {ours / reference:.2f} |", flush=True)
