"""Everything of lopsided that touches the world: HTTP, GPUs, files, the clock.

``cli`` has the commands, ``app`` puts the proxy together, ``loads`` answers what loads a model. Under them, from the
ground up, no package knowing a later one:

* ``ollama``: what Ollama's clients see of it; ``models``: what a model is; ``gpus``: the rig; ``config``: what the user sets.
* ``wire``: the way of a request and its answer, byte for byte.
* ``plans``: plans by the user's rules, beside what is loaded; ``launcher`` and ``v1``: two of three ways to deliver them.
* ``placing``: which placement each request gets, and for how long; the third way, by request options, is ``ollama.options``.
* ``learning``: how fast the cards really are.

Beside them: ``simulator``, a stand-in Ollama, and ``dashboard``, the page at ``/lopsided/``.
"""
