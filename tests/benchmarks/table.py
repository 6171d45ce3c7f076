"""The rows of the table that run.py puts together."""


def row(what, ours, reference):
    """Print one row: what is measured, in which unit; ours and the reference's; their ratio."""
    values = [f"{x:,.0f}" if x >= 1000 else f"{x:.4g}" for x in (ours, reference)]
    print(f"| {what} | {values[0]} | {values[1]} | {ours / reference:.2f} |", flush=True)
