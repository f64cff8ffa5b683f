"""How fast is it: the same network here and in other libraries, timed in turns on one machine. `spikedistill bench`."""
