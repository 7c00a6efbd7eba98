"""What every stage needs around its mathematics: folders, files, the loop, devices, errors."""
