"""The memory explorer: ipywidgets around `explore`."""

import html
from typing import Any

import ipywidgets

from memdfa_lab.widgets import base
from memdfa_lab.widgets.explored import Explored, explore
from memdfa_lab.widgets.pictures import image
from memdfa_lab.widgets.setting import ALL_RULES, MOST_LAYERS, Setting

WIDTHS = (1, 2, 5, 10, 20, 32, 50, 64, 100, 128, 200, 256, 400, 512, 800, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 5, 10, 20, 32, 50, 64, 100, 128, 200, 256, 500, 512, 1000, 1024, 2048, 4096, 8192, 16_384, 32_768)
INPUTS = {784: "784 (MNIST)", 3072: "3,072 (CIFAR)", 150_528: "150,528 (ImageNet)"}
CODE = """<div style='line-height:1.4'>
<p><b>The peaks in Python</b> (click and copy), after <code>import memdfa_lab as ml</code></p>
<pre tabindex='0' style='user-select:all;white-space:pre-wrap'>{}</pre></div>"""


class MemoryExplorer(base.Explorer):
    """Memory explorer: what one step holds under each rule, at any depth, width and batch."""

    def __init__(self, setting: Setting | None = None, **changes: Any):
        super().__init__(base.start_from(Setting, setting, changes))
        self.profiles, self.code = ipywidgets.HTML(), ipywidgets.HTML()
        groups: dict[str, Any] = {
            "Network": {
                "family": None,
                "inputs": INPUTS,
                "classes": (10, 100, 1000),
                "depth": range(1, MOST_LAYERS + 1),
                "width": WIDTHS,
                "activation": None,
                "batch_norm": None,
            },
            "Training": {"batch": BATCHES, "optimizer": None, "feedback": None, "precision": None},
            "Rules and baselines": {"rules": None, "count_rest": None},
            "Budget": {"budget": None},
        }
        self.lay_out(groups, [self.picture, self.profiles], [self.numbers, self.code])

    @property
    def explored(self) -> Explored:
        """What follows from the controls, or from the last setting that was possible."""
        self.catch_up()
        return self._explored

    def parts(self) -> base.Parts:
        self._explored = explored = explore(self.setting)
        self.numbers.value = explored.html()
        self.code.value = CODE.format(html.escape(explored.setting.code))
        legend = 0.8 + 0.07 * max(len(ALL_RULES[rule]) for rule in explored.setting.rules)
        alt, margins = f"Bytes against depth. {explored.summary()}", (0.9, 0.5, legend, 0.25)
        self.picture.value = image(explored.depth_figure(), alt, margins, (0, 0))
        yield 0.0
        alt, margins = f"One step of each rule. {explored.summary()}", (0.9, 0.85, 0.15, 0.3)
        self.profiles.value = image(explored.steps_figure(), alt, margins, (0.08, 0.35))
        yield 0.0
        for rule in explored.setting.rules:
            explored.fits(rule)
            self.numbers.value = explored.html()
            yield 0.0


memory_explorer = MemoryExplorer  # as the last line of a cell
