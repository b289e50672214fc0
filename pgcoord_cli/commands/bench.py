"""`pgcoord bench`: measures the commit rate and latency of a database."""

from __future__ import annotations

from typing import Annotated

import typer

from pgcoord_cli.commands.framework import command, duration, output_of, progress_bar, single

app = single("Measure the commit rate and latency of this database.")

BARS = " ▁▂▃▄▅▆▇█"


@command(app, "bench")
def bench(
    ctx: typer.Context,
    seconds: Annotated[str, typer.Option("--duration", metavar="DURATION", help="Length of the measurement.")] = "5s",
    in_flight: Annotated[int, typer.Option("--in-flight", metavar="N", min=1, help="Concurrent transactions.")] = 32,
    keys: Annotated[int, typer.Option("--keys", metavar="N", min=1, help="Number of keys to choose from.")] = 10_000,
) -> None:
    """Measure the commit rate and latency of this database.

    Requires a leader. Each transaction reads and writes one key of a range that is reserved for the benchmark; the keys
    are removed at the end. Fewer keys cause more conflicts; --in-flight 1 measures the latency of a single client.

    \b
    Examples:
      pgcoord bench
      pgcoord bench --in-flight 1 --duration 10s
      pgcoord bench --keys 10 -o json
    """
    from pgcoord_cli.core.bench import Bench
    from pgcoord_cli.core.concurrency import event_loop
    from pgcoord_cli.core.database import session
    from pgcoord_cli.core.leader import status as leader_status

    settings, out = output_of(ctx)
    length = duration("--duration")(seconds) or 0
    with session.command_session(settings, "bench", writes=True) as conn:
        leader_status.wait_for_leader(conn, settings.schema, 10)
    with progress_bar(out, "committing", round(length)) as advance:
        result = event_loop.run(Bench(length, in_flight, keys, advance).run(settings))
    out.document({"bench": result._asdict()})
    if not out.is_json:
        out.note(f"commits per second in each tenth of the run: {plot(result.rates)}")


def plot(rates: list[int]) -> str:
    """Returns one bar character per rate, scaled so that the highest rate has the full bar."""
    highest = max(rates) or 1
    return "".join(BARS[round(rate / highest * (len(BARS) - 1))] for rate in rates)
