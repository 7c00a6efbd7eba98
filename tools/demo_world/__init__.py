"""The little world that the demo benchmark photographs: stuff, objects and scenes.

`stuff` fills whole regions with a texture, `objects` draws things over them and `scene` composes
both into a picture with its exact label map. Everything is a function of a NumPy generator.
"""
