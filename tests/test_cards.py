from minionerec.cards import CARDS, find_card, unknown_card


def test_cards_are_found_as_people_write_them():
    assert (
        find_card("rtx4090") is find_card("NVIDIA GeForce RTX 4090") is next(c for c in CARDS if c.name == "RTX 4090")
    )
    assert find_card("RTX 4090 D").tflops < find_card("RTX 4090").tflops and find_card("h100-pcie").bandwidth == 2000
    assert all(find_card(card.name) is card for card in CARDS) and unknown_card("") is None
    assert "did you mean A100 40GB or A100 80GB?" in unknown_card("a100")
    assert "did you mean RTX 4090" in unknown_card("RTX 409O")
    assert "did you mean" not in unknown_card("7900 XTX") and "--gpu_memory 12GB" in unknown_card("7900 XTX")
