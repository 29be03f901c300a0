"""`lynearm teacher`: look inside a teacher."""

from __future__ import annotations

from lynearm.cli.options import make_app
from lynearm.cli.teacher_attention import attention
from lynearm.cli.teacher_profile import profile

teacher_app = make_app("Look inside a teacher.")
teacher_app.command("profile")(profile)
teacher_app.command("attention")(attention)
