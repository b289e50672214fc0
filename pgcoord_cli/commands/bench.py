"""`pgcoord bench`: this database's commit rate and latency."""

from __future__ import annotations

from typing import Annotated

import typer

from pgcoord_cli.commands.framework import PgcoordCommand, duration, output_of, progress_bar, single

app = single("Measure how many commits a second this database does.")

BARS = " ▁▂▃▄▅▆▇█"


@app.command("bench", cls=PgcoordCommand)
def bench(
    ctx: typer.Context,
    seconds: Annotated[str, typer.Option("--duration", metavar="DURATION", help="How long to measure.")] = "5s",
    in_flight: Annotated[
        int, typer.Option("--in-flight", metavar="N", min=1, help="Transactions at the same time.")
    ] = 32,
    keys: Annotated[int, typer.Option("--keys", metavar="N", min=1, help="Keys they choose from.")] = 10_000,
) -> None:
    """Measure how many commits a second this database does.

    Each transaction reads a key of the bench's own and writes it; all are removed at the end. It needs a leader. Fewer
    keys make conflicts; one in flight shows the latency of a lone client.

    \b
    Examples:
      pgcoord bench
      pgcoord bench --in-flight 1 --duration 10s
      pgcoord bench --keys 10 -o json
    """
    import asyncio

    from pgcoord_cli.core.bench import Bench
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.leader import status as leader_status

    settings, out = output_of(ctx)
    length = duration("--duration")(seconds) or 0
    with session.command_session(settings, "bench", writes=True) as conn:
        leader_status.wait_for_leader(conn, settings.schema, 10)
    with progress_bar(out, "committing", round(length)) as advance:
        result = asyncio.run(Bench(length, in_flight, keys, advance).run(settings))
    out.document({"bench": result._asdict()})
    if not out.is_json:
        out.note(f"commits a second, from the first tenth of the run to the last: {plot(result.rates)}")


def plot(rates: list[int]) -> str:
    """A bar for each rate, the highest one full."""
    highest = max(rates) or 1
    return "".join(BARS[round(rate / highest * (len(BARS) - 1))] for rate in rates)
