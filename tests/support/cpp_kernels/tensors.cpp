// What a package uses of torch's stable C ABI, for tests that run its functions without torch.
#include <stdint.h>
#include <stdlib.h>

struct AtenTensorOpaque {
    void* data;
    int64_t *sizes, *strides;
    int64_t rank;
    int32_t dtype;
};
typedef AtenTensorOpaque* Tensor;

extern "C" {
int32_t aoti_torch_get_data_ptr(Tensor t, void** data) { *data = t->data; return 0; }
int32_t aoti_torch_get_strides(Tensor t, int64_t** strides) { *strides = t->strides; return 0; }
int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_dtype_float16() { return 2; }
int32_t aoti_torch_dtype_bfloat16() { return 2; }
int32_t aoti_torch_dtype_float32() { return 4; }
int32_t aoti_torch_dtype_float64() { return 8; }

// Here a dtype is its size in bytes.
int32_t aoti_torch_empty_strided(int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t,
                                 int32_t, Tensor* made) {
    int64_t last = 0;
    Tensor t = *made = (Tensor)malloc(sizeof(AtenTensorOpaque));
    t->sizes = (int64_t*)malloc(2 * rank * sizeof(int64_t));
    t->strides = t->sizes + rank;
    for (int64_t n = 0; n < rank; ++n) {
        t->sizes[n] = sizes[n];
        t->strides[n] = strides[n];
        last += (sizes[n] - 1) * strides[n];
    }
    t->rank = rank;
    t->dtype = dtype;
    t->data = malloc((last + 1) * dtype);
    return 0;
}
}
