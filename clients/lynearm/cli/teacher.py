"""`lynearm teacher`: a teacher, beside what it writes into streams."""

from __future__ import annotations

from lynearm.cli.options import make_app
from lynearm.cli.teacher_serve import serve

teacher_app = make_app("Serve a teacher, and look inside it.")
teacher_app.command("serve")(serve)
