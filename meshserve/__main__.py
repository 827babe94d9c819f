"""The `meshserve` command, also as `python -m meshserve`."""

import sys


def main() -> None:
    """Runs a command line and exits."""
    if sys.argv[1:2] == ["probe"]:
        code = _probe_as_announced(sys.argv[2:])
        if code is not None:
            sys.exit(code)
    from meshserve.cli.main import main as run_command_line

    run_command_line()


def _probe_as_announced(arguments: list[str]) -> int | None:
    """The exit code of `meshserve probe [--liveness] SERVICE` where that service has noted how it
    is asked, as in a container; else None. What other commands need is not imported: it would take
    ten times as long, every few seconds."""
    from services.runtime.health_check import LIVENESS, announced, ask

    words = [word for word in arguments if word != "--liveness"]
    endpoint = announced(words[0]) if len(words) == 1 else None
    if endpoint is None:
        return None
    (service,) = words
    problem = ask(endpoint, "" if words == arguments else LIVENESS)
    if problem:
        from meshserve.cli.exits import EXIT_UNAVAILABLE
        from meshserve.cli.output import print_error

        print_error(f"{service} {problem}")
        return EXIT_UNAVAILABLE
    sys.stdout.write(f"{service} is serving\n")
    return 0


if __name__ == "__main__":
    main()
