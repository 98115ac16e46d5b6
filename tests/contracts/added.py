"""A monitor from a folder of one's own, as text."""

MONITOR = """
from foreshock.monitors.base import Needs, Signal


class LastLoss:
    needs = Needs()

    def __init__(self, every_steps: int) -> None:
        self.signals = (Signal("last_loss", "nats/token", "up", every_steps=every_steps, family="optimization"),)

    def observe(self, view):
        return {"last_loss": view.loss.detach()}
"""
