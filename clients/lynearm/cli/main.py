"""The `lynearm` command."""

from __future__ import annotations

from lynearm.cli.credentials import take_credentials
from lynearm.cli.demo import demo
from lynearm.cli.export import export_app
from lynearm.cli.import_files import import_files
from lynearm.cli.options import make_app
from lynearm.cli.serve import serve
from lynearm.cli.streams import streams_app
from lynearm.cli.student import student_app
from lynearm.cli.teach import teach
from lynearm.cli.teacher import teacher_app
from lynearm.cli.tokens import tokens_app
from lynearm.cli.train import train
from lynearm.cli.up import down, up

app = make_app("Streams what a teacher model knows to the training loops of small students.")
app.callback()(take_credentials)
app.command()(serve)
app.command()(up)
app.command()(down)
app.command()(teach)
app.add_typer(teacher_app, name="teacher")
app.command()(train)
app.add_typer(student_app, name="student")
app.add_typer(export_app, name="export")
app.add_typer(streams_app, name="streams")
app.add_typer(tokens_app, name="tokens")
app.command("import")(import_files)
app.command()(demo)


def main() -> None:
    """Run the command line."""
    app(prog_name="lynearm")


if __name__ == "__main__":
    main()
