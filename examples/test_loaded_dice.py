from loaded_dice import LoadedDice

pytest_plugins = ["vhostsock.testing.plugin"]


def test_rolls_are_numbered_also_across_a_pause(vhost_user):
    guest = vhost_user(LoadedDice(face=3))
    assert guest.request(room=10) == b"roll 1: 3\n"
    guest.pause()
    guest.resume()
    assert guest.request(room=20) == b"roll 2: 3\n" * 2
