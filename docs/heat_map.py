"""The gate along a text, and along an answer: cells of a notebook, or a script that ends in a plot.

python docs/heat_map.py [MODEL] [PICTURE.png]        needs the extra `plot`
"""

# %% A model, in a process of its own
import sys

import matplotlib.pyplot as plt
import numpy as np

from service import XLora

path = sys.argv[1] if len(sys.argv) > 1 else "model_store/demo"
picture = sys.argv[2] if len(sys.argv) > 2 else "experts.png"
model = XLora(path)

# %% One answer, with the weights of every site for the prompt's tokens and its own
prompt = "What is 88 + 76? Which strand pairs with CTA TCT TAT?\n"
answer = model.generate(prompt, temperature=0, scalings="full", scalings_start=0)
print(answer.text)
print(answer.scalings.shape, "positions, sites, experts")

# %% Many answers: the same question to the mixture and to every expert alone
settings = [{}, *({"label": name, "experts": {"weights": {name: 1}}} for name in answer.gate.experts)]
comparison = model.compare(prompt, settings, temperature=0, max_tokens=40)
print(np.round(comparison.log_likelihood_per_token, 2))

# %% The weights along the text: each column is a token, under the weights that produced it
texts = model.tokenizer.texts([*answer.prompt_token_ids, *answer.token_ids])[1 : 1 + len(answer.scalings)]
figure, (lines, cells) = plt.subplots(2, 1, figsize=(max(8, 0.22 * len(texts)), 6), sharex=True)
for name, weights in zip(answer.gate.experts, answer.gate.mean.T, strict=True):
    lines.plot(weights[: len(texts)], label=name)
lines.axvline(len(answer.prompt_token_ids) - 1.5, color="grey", linestyle="--")
lines.set_ylabel("weight, mean over the sites")
lines.legend(ncols=len(answer.gate.experts), loc="upper right")
leaders = answer.scalings.argmax(axis=2).T  # [sites, positions]
cells.imshow(leaders[:, : len(texts)], aspect="auto", interpolation="nearest", cmap="tab10", vmin=-0.5, vmax=9.5)
cells.set_ylabel("site, coloured by its leading expert")
cells.set_xticks(range(len(texts)), [text.replace("\n", "⏎") for text in texts], rotation=90, fontsize=7)
figure.tight_layout()
figure.savefig(picture)
model.close()
