"""Ray, as every part of lynearm that runs on it connects to it: `session.ray_session`."""
