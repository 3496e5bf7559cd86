// The sources that this library was built from, by their hash (sources.py; setup.py defines it).

extern "C" const char* built_from() { return BUILT_FROM; }
