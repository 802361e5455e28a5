"""Draw schedules.png beside this file: the learning-rate factor over one stage, by the code that training uses."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from trainer.config.schema import Schedule
from trainer.optim import lr_factor

STEPS = 200
SHOWN = {
    "constant": Schedule(name="constant", warmup=0.1),
    "linear": Schedule(name="linear", warmup=0.1),
    "cosine": Schedule(name="cosine", warmup=0.1, floor=0.1),
    "cosine-restarts": Schedule(name="cosine-restarts", warmup=0.1, cycles=3),
    "polynomial": Schedule(name="polynomial", warmup=0.1, power=2.0),
    "inverse-sqrt": Schedule(name="inverse-sqrt", warmup=0.1),
    "wsd": Schedule(name="wsd", warmup=0.1, decay=0.3),
}
NOTES = {
    "constant": "plateau: this, times its cuts",
    "cosine": "floor 0.1",
    "cosine-restarts": "cycles 3",
    "polynomial": "power 2",
    "wsd": "decay 0.3",
}


def draw(path: Path) -> None:
    """One small panel for each schedule, all with a warm-up of a tenth of the steps."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    for panel, (name, settings) in zip(panels.flat, SHOWN.items(), strict=False):
        panel.plot([lr_factor(settings, step, STEPS) for step in range(STEPS)], color="#2b6cb0", linewidth=1.6)
        panel.set_title(name, fontsize=9)
        panel.text(STEPS, 1.05, NOTES.get(name, ""), fontsize=7, color="#555555", ha="right", va="bottom")
        panel.set_ylim(0, 1.18)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels.flat[-1].set_axis_off()
    panels[1, 0].set_xlabel("step", fontsize=8)
    panels[1, 0].set_ylabel("factor of the peak", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("schedules.png"))
