// Calls a kernel's entry as attncc/runtime/cpp.py does, in a process of its own: a kernel for a processor that the tests
// run under emulation. Usage: caller KERNEL.so CALL RESULT, where CALL holds 64-bit words (inputs, sizes, outputs; the
// sizes; for each input, then output: bytes, rank, strides), then the bytes of each. RESULT gets the outputs' bytes.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef int32_t Entry(const void* const*, const int64_t* const*, const int64_t*, void* const*, const int64_t* const*);

static void fail(const char* why) {
    fprintf(stderr, "%s\n", why);
    exit(9);
}
static void take(FILE* from, void* to, size_t bytes) {
    if (fread(to, 1, bytes, from) != bytes) fail("the call's file is too short");
}

int main(int argc, char** argv) {
    if (argc != 4) fail("caller KERNEL.so CALL RESULT");
    void* library = dlopen(argv[1], RTLD_NOW);
    if (!library) fail(dlerror());
    Entry* run = (Entry*)dlsym(library, "attncc_run");
    if (!run) fail(dlerror());
    FILE* call = fopen(argv[2], "rb");
    if (!call) fail("no such call");
    int64_t counts[3], sizes[64] = {}, bytes[64], strides[64][16];
    take(call, counts, sizeof counts);
    const int64_t inputs = counts[0], all = inputs + counts[2];
    if (all > 64 || counts[1] > 64) fail("too many tensors or sizes");
    take(call, sizes, counts[1] * 8);
    void* data[64];
    const int64_t* strides_of[64];
    for (int64_t n = 0; n < all; ++n) {
        int64_t rank;
        take(call, &bytes[n], 8);
        take(call, &rank, 8);
        if (rank > 16) fail("too many dimensions");
        take(call, strides[n], rank * 8);
        strides_of[n] = strides[n];
        data[n] = malloc(bytes[n] + 1);
    }
    for (int64_t n = 0; n < all; ++n) take(call, data[n], bytes[n]);
    const int32_t failed = run(data, strides_of, sizes, data + inputs, strides_of + inputs);
    FILE* result = fopen(argv[3], "wb");
    for (int64_t n = inputs; n < all; ++n) fwrite(data[n], 1, bytes[n], result);
    fclose(result);
    return failed;
}
