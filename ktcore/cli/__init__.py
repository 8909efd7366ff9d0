"""The commands, one file each: `ktcore <file name>`, and `ktcore-probe` for `ktcore probe`.

A command is a module here with a function `command`, whose signature and docstring typer turns into
options and help. Modules import what is slow (torch, matplotlib) inside that function, so that
`ktcore --help` is immediate.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

MISSING = (
    "the commands need packages that the library does not ({error}): pip install 'ktcore[cli]'"
)


def _application() -> Any:
    import typer

    import ktcore

    app = typer.Typer(
        name="ktcore",
        help="Run Mixture-of-Experts language models on whatever hardware you have.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def version(value: bool) -> None:
        if value:
            print(f"ktcore {ktcore.__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", callback=version, is_eager=True, help="Print the version and exit."
        ),
    ) -> None:
        pass

    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        if not module.startswith("_"):
            app.command(module)(importlib.import_module(f"{__name__}.{module}").command)
    return app


def _run(arguments: list[str]) -> int:
    """Exit status: 0 done, 1 the work failed, 2 the command line was wrong."""
    from ktcore._settings import SettingError

    try:
        import typer

        app = _application()
        from ktcore.cli._errors import USER_ERRORS
    except ImportError as error:
        print(f"error: {MISSING.format(error=error)}", file=sys.stderr)
        return 1
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # typer brings its own click or uses the installed one, by version: this is whichever it uses.
    ClickException = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

    try:
        # Outside standalone mode typer returns what `typer.Exit` carries.
        result = typer.main.get_command(app).main(arguments, "ktcore", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except ClickException as error:
        error.show()
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def main() -> None:
    """`ktcore`."""
    sys.exit(_run(sys.argv[1:]))


def probe_main() -> None:
    """`ktcore-probe`."""
    sys.exit(_run(["probe", *sys.argv[1:]]))
