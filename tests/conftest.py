"""What holds for every test: nothing may be left behind, and hypothesis tries the same examples each time, however slow the machine is.

More and other ones: ``pytest --hypothesis-profile soak -k fuzz`` and the like.
"""

from hypothesis import settings

pytest_plugins = ["tests.support.leaks"]

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("soak", derandomize=False, deadline=None, max_examples=20_000)
settings.load_profile("same")
