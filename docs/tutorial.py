# ruff: noqa: T201
# %% [markdown]
# # A tour of a finished run, in Python
#
# This page is a Python file, `docs/tutorial.py`: run it after the [quick start](start.md), as a whole or cell by cell
# in an editor that knows `# %%`. It reads `runs/tiny` and the sample's test images, and draws three pictures. Those
# shown here come from recipe `tiny` trained on all 60,000 images of Fashion-MNIST and measured on all 10,000 test
# images, so yours will differ a little.
#
# A finished run has a *pool*: one set of weights that contains many models, called *paths*. Each path has its own size,
# cost and accuracy:

# %%
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import webdataset

from lgp_dist import api

SHARDS, PICTURES = "shards/sample", Path("tutorial")
PICTURES.mkdir(exist_ok=True)

run = api.open_run("runs/tiny")
rows = sorted(run.paths(), key=lambda row: row["flops"])
for row in rows:
    print(f"{row['key']:16} {row['params'] / 1e6:.2f} M {row['flops'] / 1e6:6.2f} M multiply-adds {row['top1']:.2f} %")

# %% [markdown]
# A path's name is its *key*: `r0.0-3+r1.4-5` runs blocks 0 to 3 of row 0, the narrow one, then blocks 4 and 5 of row 1,
# the wide one. Name a limit, and the most accurate path within it is your model:

# %%
best = run.best(max_params="400k")
print(f"{best['key']} is the best of at most 400,000 parameters.")

figure, axes = plt.subplots(figsize=(6, 4))
axes.scatter([row["flops"] / 1e6 for row in rows], [row["top1"] for row in rows], label="paths")
marked = {"s": 160, "facecolors": "none", "edgecolors": "C3", "label": "best up to 0.4 M parameters"}
axes.scatter(best["flops"] / 1e6, best["top1"], **marked)
axes.set(xlabel="multiply-adds of one image (M)", ylabel="top-1 (%)")
axes.legend(loc="lower right")
figure.savefig(PICTURES / "paths.png", dpi=120, bbox_inches="tight")

# %% [markdown]
# ![Accuracy of every path against its cost; the best up to 0.4 M parameters is marked](tutorial/paths.png)
#
# The pool is one module. The key says which path a call takes, and changing it loads nothing. Here are test images
# that the cheapest and the most accurate path classify differently:

# %%
samples = [
    pair
    for tar in sorted(Path(SHARDS).glob("*test*.tar"))
    for pair in webdataset.WebDataset(str(tar), shardshuffle=False).decode("torchl").to_tuple("png", "cls")
]
images = (torch.stack([image for image, _ in samples]).unsqueeze(1) - 0.2856) / 0.3527
labels = torch.tensor([label for _, label in samples])

pool, cheap, accurate = run.pool(), rows[0], run.best()
with torch.inference_mode():
    small, large = (
        torch.cat([pool(part, row["key"]) for part in images.split(500)]).softmax(dim=-1) for row in (cheap, accurate)
    )

names = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
differ = (small.argmax(-1) != large.argmax(-1)).nonzero().flatten()
print(f"The two paths differ on {len(differ)} of {len(images)} images.")
figure, grid = plt.subplots(1, 5, figsize=(9, 2.4))
for axes, index in zip(grid, differ[:5].tolist(), strict=False):
    axes.imshow(samples[index][0], cmap="gray_r")
    seen = [names[int(guess)] for guess in (labels[index], small[index].argmax(), large[index].argmax())]
    axes.set_title("{}\ncheapest: {}\nbest: {}".format(*seen), fontsize=9)
for axes in grid:
    axes.axis("off")
figure.savefig(PICTURES / "images.png", dpi=120, bbox_inches="tight")

# %% [markdown]
# ![Five test images with their class and the classes that the two paths predict](tutorial/images.png)
#
# Two paths can share the work: the cheapest classifies every image, and the most accurate one runs only where the
# highest probability of the first is below a threshold. The curve has a point for each threshold from 0 to 1:

# %%
curve = []
for threshold in torch.linspace(0, 1, 41):
    unsure = small.max(dim=-1).values < threshold
    answers = torch.where(unsure, large.argmax(-1), small.argmax(-1))
    flops = cheap["flops"] + unsure.float().mean().item() * accurate["flops"]
    curve.append((flops / 1e6, 100 * (answers == labels).float().mean().item()))

figure, axes = plt.subplots(figsize=(6, 4))
axes.scatter([row["flops"] / 1e6 for row in rows], [row["top1"] for row in rows], label="one path for all images")
axes.plot(*zip(*curve, strict=True), color="C1", label="the cheapest first, the best where it is unsure")
axes.set(xlabel="multiply-adds of one image, on average (M)", ylabel="top-1 (%)")
axes.legend(loc="lower right")
figure.savefig(PICTURES / "cascade.png", dpi=120, bbox_inches="tight")

# %% [markdown]
# ![Accuracy against average cost of single paths and of both paths in turn](tutorial/cascade.png)
#
# At half the cost of the best path (6.1 of 11.8 M), the two together are right on 86.7 % of the images. The best path
# alone is right on 86.9 %, and single paths of about the same cost as the two on 82.5 to 83.3 %. These costs are
# averages: an image that both paths see costs more than the best path alone.
#
# `run.export` makes a path a standalone model: a folder for timm, plain torch and ONNX. Its logits are compared with
# the pool's on test images.

# %%
folder = run.export(best["key"], "chosen")
print(sorted(file.name for file in folder.iterdir()))

# %% [markdown]
# Next: the whole [Python API](api.md), and what the [exported folder](descendants.md#the-folder) holds.
