"""Writes the demo's files beside itself: a synthetic catalogue and synthetic customers, in the published layout.

240 items in 10 departments of 4 lines of 6 variants. Customers have three habits: 60% of their purchases go to the line
that goes with the line of the last item (bolts, then washers), in the same variant; 15% stay within the line; 25% go to
any item, popular ones first. The customers of train, valid and test are different people.

    python examples/demo/make_demo.py
"""

import csv
import json
import os
import random

DEPARTMENTS = {
    "Fasteners": ["Hex Bolt", "Wood Screw", "Lock Nut", "Flat Washer"],
    "Adhesives": ["Epoxy Resin", "Super Glue", "Thread Sealant", "Masking Tape"],
    "Abrasives": ["Sanding Disc", "Grinding Wheel", "Polishing Pad", "Wire Brush"],
    "3D Printing": ["PLA Filament", "Brass Nozzle", "Build Plate", "Resin Bottle"],
    "Electrical": ["Heat Shrink Tubing", "Ring Terminal", "Cable Tie", "Fuse Holder"],
    "Safety": ["Nitrile Glove", "Dust Mask", "Ear Plug", "Safety Goggle"],
    "Lab": ["Glass Beaker", "Test Tube", "Graduated Cylinder", "Pipette Tip"],
    "Plumbing": ["Ball Valve", "Hose Clamp", "Pipe Elbow", "O-Ring Kit"],
    "Cutting": ["Drill Bit", "End Mill", "Saw Blade", "Deburring Tool"],
    "Measuring": ["Digital Caliper", "Feeler Gauge", "Steel Ruler", "Dial Indicator"],
}
BRANDS = ["Corvex", "Norrland", "Ashby & Co.", "Tamino", "O'Dell", "Brüder", "Kestrel", "Halden"]
VARIANTS = ["Small", "Medium", "Large", "Heavy Duty", "Stainless", "Value Pack"]
CUSTOMERS = {"train": 900, "valid": 200, "test": 500}
COLUMNS = [
    "user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid",
]  # fmt: skip


def main() -> None:
    folder = os.path.dirname(os.path.abspath(__file__))
    chance = random.Random(7)
    index, metadata = {}, {}
    for department, nouns in enumerate(DEPARTMENTS.values()):
        for line, noun in enumerate(nouns):
            for variant, word in enumerate(VARIANTS):
                item = str(len(index))
                size, count = chance.choice([3, 4, 6, 8, 10, 12, 20, 25]), chance.choice([1, 2, 5, 10, 50, 100])
                title = f"{chance.choice(BRANDS)} {word} {noun}, {size} mm (Pack of {count})"
                index[item] = [f"<a_{department}>", f"<b_{line}>", f"<c_{variant}>"]
                metadata[item] = {
                    "title": title,
                    "description": f"{noun} for workshop and home, {word.lower()} version, sold in packs of {count}.",
                }
    items = len(index)
    variants = len(VARIANTS)
    companion = list(range(items // variants))  # of every line
    chance.shuffle(companion)
    by_popularity = list(range(items))
    chance.shuffle(by_popularity)
    popularity = [0.0] * items
    for rank, item in enumerate(by_popularity):
        popularity[item] = 1 / (rank + 3)

    def purchases(length: int) -> list[int]:
        bought = chance.choices(range(items), popularity)
        while len(bought) < length:
            (line, variant), habit = divmod(bought[-1], variants), chance.random()
            if habit < 0.6:
                bought.append(companion[line] * variants + variant)
            elif habit < 0.75:
                bought.append(line * variants + chance.randrange(variants))
            else:
                bought += chance.choices(range(items), popularity)
        return bought

    def sid(item: int) -> str:
        return "".join(index[str(item)])

    def title(item: int) -> str:
        return metadata[str(item)]["title"]

    customer = 0
    for split, count in CUSTOMERS.items():
        with open(os.path.join(folder, f"{split}.csv"), "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for _ in range(count):
                customer += 1
                bought = purchases(chance.randint(3, 8))
                # Training sees every prefix of a customer's history, the held-out files only the last purchase.
                for end in range(1, len(bought)) if split == "train" else [len(bought) - 1]:
                    past, target = bought[:end], bought[end]
                    histories = [[title(i) for i in past], past, [sid(i) for i in past]]
                    writer.writerow(
                        [f"C{customer}", histories[0], title(target), histories[1], target, histories[2], sid(target)]
                    )
    for name, data in (("demo.index.json", index), ("demo.item.json", metadata)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(data, file, indent=0, ensure_ascii=False)
            file.write("\n")
    with open(os.path.join(folder, "info.txt"), "w", encoding="utf-8") as file:
        for item in range(items):
            file.write(f"{sid(item)}\t{title(item)}\t{item}\n")


if __name__ == "__main__":
    main()
