"""The rules that a night's images are held to. Each is `off`, `warn` or `stop` (`config.project.RulesConfig`)."""

from collections.abc import Iterator, Mapping

import pyarrow as pa
from pyarrow import compute

from nightshift.config.project import Effect, RulesConfig
from nightshift.data.rows import iterate, kept, repeated
from nightshift.refs import Finding

CONFLICT = "it stands under several labels"
_NAMED = 5
"""How many images or classes a finding names."""


def findings_of(rows: pa.Table, before: pa.Table | None, rules: RulesConfig) -> list[Finding]:
    """What the rules that are not off have found in tonight's rows. A rule that is kept has no finding.

    Args:
        before: the rows of the last snapshot that was fit to train on; None if there was none.
    """
    found = []
    for name, detail in _broken(rows, before, rules):
        effect: Effect = getattr(rules, name)
        if effect != "off":
            found.append(Finding(rule=name, ok=effect != "stop", detail=detail))
    return found


def classes_of(rows: pa.Table) -> dict[str, int]:
    """How many images each class has, over all splits, by name in sorted order."""
    counted = kept(rows, "label").group_by("label").aggregate([([], "count_all")])
    return dict(sorted(zip(counted["label"].to_pylist(), counted["count_all"].to_pylist(), strict=True)))


def duplicates_of(rows: pa.Table) -> int:
    """How many images are copies of another one."""
    used = kept(rows, "content")
    return int(len(used) - compute.count_distinct(used["content"]).as_py())


def conflicts_of(rows: pa.Table) -> list[str]:
    """The images that are left out because they stand under several labels."""
    return [name for name, reason in iterate(rows, "id", "refused") if reason.startswith(CONFLICT)]


def _broken(rows: pa.Table, before: pa.Table | None, rules: RulesConfig) -> Iterator[tuple[str, str]]:
    counts = classes_of(rows)
    unreadable = [row for row in iterate(rows, "id", "unreadable") if row[1]]
    if len(unreadable) > rules.max_unreadable * len(rows):
        yield (
            "unreadable",
            f"{len(unreadable):,} of {len(rows):,} images cannot be read, more than {rules.max_unreadable:.1%}: "
            + _some([f"{name} ({reason})" for name, reason in unreadable]),
        )
    few = {name: count for name, count in counts.items() if count < rules.min_images_per_class}
    if few:
        yield (
            "few_images",
            f"{len(few):,} classes have fewer than {rules.min_images_per_class} images: "
            + _some([f"{name} has {count}" for name, count in few.items()]),
        )
    torn = torn_of(rows)
    if copies := duplicates_of(rows):
        where = "" if torn else "; each copy is in the split of its original"
        yield "duplicates", f"{copies:,} images are exact copies of others{where}"
    if conflicts := conflicts_of(rows):
        yield "conflicts", f"{len(conflicts):,} images stand under several labels and are left out: {_some(conflicts)}"
    if torn:
        yield (
            "groups",
            f"{len(torn):,} groups or images stand in two splits: {_some(torn)}. Give them one group, or one split",
        )
    if before is not None and len(before):
        yield from _since(rows, before, counts, rules)


def _since(
    rows: pa.Table, before: pa.Table, counts: Mapping[str, int], rules: RulesConfig
) -> Iterator[tuple[str, str]]:
    """What has changed since the snapshot before by more than it may."""
    old = classes_of(before)
    if new := sorted(counts.keys() - old.keys()):
        yield "new_class", f"{len(new):,} classes are new: {_some(new)}"
    if gone := sorted(old.keys() - counts.keys()):
        yield "gone_class", f"{len(gone):,} classes have no image any more: {_some(gone)}"
    vanished = len(before) - compute.sum(compute.is_in(before["id"], value_set=rows["id"])).as_py()
    if vanished > rules.max_vanished * len(before):
        yield (
            "vanished",
            f"{vanished:,} of the {len(before):,} images of the last snapshot are gone, more than "
            f"{rules.max_vanished:.0%}",
        )
    if moved_away := _relabelled(rows, before, counts, rules):
        yield (
            "relabelled",
            f"more than {rules.max_relabelled:.0%} of the images of {len(moved_away):,} classes stand under other "
            f"labels now: {_some(moved_away)}",
        )
    both = sorted(old.keys() & counts.keys())
    total, total_old = sum(counts[name] for name in both), sum(old[name] for name in both)
    if len(both) < 2 or not total or not total_old:
        return
    moved = {name: counts[name] / total - old[name] / total_old for name in both}
    most = max(moved, key=lambda name: abs(moved[name]))
    if abs(moved[most]) > rules.max_label_shift:
        from scipy.stats import chi2_contingency  # here, because it takes a second and 70 MB, and is seldom needed

        p_value = chi2_contingency([[old[name] for name in both], [counts[name] for name in both]]).pvalue
        yield (
            "label_shift",
            f"the share of {most} changed from {old[most] / total_old:.1%} to {counts[most] / total:.1%} "
            f"(chi-square over all classes: p = {p_value:.2g})",
        )


def _relabelled(rows: pa.Table, before: pa.Table, counts: Mapping[str, int], rules: RulesConfig) -> list[str]:
    """The classes that lost too many images to others. One that is gone, as when it is renamed, has a rule of its own.

    An image is known by its content, because where folders are the labels, to be relabelled is to have another name.
    """
    old, new = (kept(part, "content", "label") for part in (before, rows))
    now = new["label"].take(compute.index_in(old["content"], value_set=new["content"]))
    stayed = pa.table({"label": old["label"], "moved": compute.not_equal(old["label"], now)}).drop_null()
    totals = stayed.group_by("label").aggregate([("moved", "sum"), ([], "count_all")]).sort_by("label")
    return [
        f"{moved:,} of {total:,} of {name}"
        for name, moved, total in iterate(totals, "label", "moved_sum", "count_all")
        if name in counts and total >= rules.min_images_per_class and moved > rules.max_relabelled * total
    ]


def torn_of(rows: pa.Table) -> list[str]:
    """The groups, and the images that stand in the source more than once, which are in two splits."""
    used = kept(rows, "id", "group", "content", "split")
    torn = []
    for name, part in (("group", used.filter(compute.not_equal(used["group"], ""))), ("content", used)):
        grouped = repeated(part, name).group_by(name).aggregate([("split", "count_distinct"), ("id", "min")])
        torn += grouped.filter(compute.greater(grouped["split_count_distinct"], 1))[
            "group" if name == "group" else "id_min"
        ].to_pylist()
    return sorted(torn)


def _some(names: list[str]) -> str:
    """The first few, and how many more there are."""
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")
