"""Images of a data set."""

from typing import Any

from matplotlib.figure import Figure

from memdfa_lab.figures.inputs import draws
from memdfa_lab.figures.style import panels
from memdfa_lab.lab.datasets import check_data


@draws()
def images(data: Any) -> Figure:
    """Draw the first training image of each class, as it was before normalisation (`data`: `ml.datasets.Data`).

    Raises ValueError if a class has none.
    """
    check_data("images", data)
    for label in range(data.classes):
        if not (data.y_train == label).any():
            raise ValueError(f"there is no training image of class {label}: take a larger part of the data")
    figure, all_axes = panels(data.classes, data.classes, height=0.6, grid=False)
    for label, axes in enumerate(all_axes):
        image = data.x_train[data.y_train == label][0] + data.mean / data.pixel_range
        low, high = image.min(), image.max()
        axes.imshow(((image - low) / (high - low)).movedim(0, -1).squeeze(-1), cmap="gray")
        axes.set_title(label)
        axes.axis("off")
    return figure
