"""Draw nbs/assets/card.png, the image that messengers show for a link to the site, from
results/published_figure.csv: `python .ci/social_card.py`."""

import csv

import matplotlib
import tree

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STYLES = {  # the first and the last step of the paper's figure
    "G1-GN-Baseline": ("depthwise, group norm", "#f0a35e", "s"),
    "G16-LN+PN-Half": ("group convolutions, Proxy Norm, half resolution", "#82b8f2", "o"),
}


def main():
    rows = list(csv.DictReader((tree.ROOT / "results" / "published_figure.csv").open()))
    ink, ground = "#f4f7fa", "#22303f"
    colours = {f"{k}": ink for k in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
    with plt.rc_context({"font.size": 17, "axes.edgecolor": "#8fa0b0", **colours}):
        fig, ax = plt.subplots(figsize=(12, 6.3), dpi=100, facecolor=ground)
        ax.set_facecolor(ground)
        for series, (label, colour, mark) in STYLES.items():
            mine = [r for r in rows if r["series"] == series]
            if not mine:
                raise SystemExit(f"social_card: results/published_figure.csv has no {series}")
            x = [float(r["train_img_s_pod16"]) for r in mine]
            y = [float(r["top1_pct"]) for r in mine]
            ax.plot(x, y, marker=mark, ms=11, lw=3, color=colour, label=label)
        ax.set_xscale("log")
        ticks = {1500: "1,500", 3000: "3,000", 6000: "6,000", 12000: "12,000", 24000: "24,000"}
        ax.set_xticks(list(ticks), list(ticks.values()))
        ax.minorticks_off()
        ax.set_xlabel("published training throughput on a POD16, images/s")
        ax.set_ylabel("ImageNet top-1, %")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, loc="lower left", labelcolor=ink)
        fig.suptitle("effnet_repro", x=0.07, y=0.965, ha="left", size=40, weight="bold")
        fig.text(0.07, 0.79, "Making EfficientNet more efficient, as notebooks that run", size=23)
        fig.subplots_adjust(left=0.09, right=0.96, bottom=0.14, top=0.74)
        fig.savefig(tree.ROOT / "nbs" / "assets" / "card.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
