"""SkyRL's trainer with our environment: entry point, generator, configuration."""
