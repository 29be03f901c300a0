"""`lynearm teacher`: ask a teacher directly, and look inside it."""

from __future__ import annotations

from lynearm.cli.options import make_app
from lynearm.cli.teacher_attention import attention
from lynearm.cli.teacher_profile import profile
from lynearm.cli.teacher_serve import serve

teacher_app = make_app("Ask a teacher directly, and look inside it.")
teacher_app.command("serve")(serve)
teacher_app.command("profile")(profile)
teacher_app.command("attention")(attention)
