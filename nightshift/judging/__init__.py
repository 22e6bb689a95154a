"""Whether a model is good, and whether it goes live.

`evaluation` measures a run's model on the test images. `gate` compares a published version with the champion on the
same images and promotes it if it passes: `tonight` tests a champion of another night on them, `published` loads it,
`answers` matches what the two say, `paired` tests whether one is worse, on the whole and on each part, and `table`
shows it. `report` puts all of it on one page, with the figures of `plots`, the images of `pictures`, and where the
night went, by `goodput`; `nights` is a line for each of the last. `came_in` looks at what is new since the champion was
trained: `arrivals` finds it, `two_samples` tests whether it is of another kind, `label_errors` doubts labels, and
`drift` is what is stored. Nothing goes live on a comparison with a version that was no longer the champion, and what
came in decides nothing.
"""
